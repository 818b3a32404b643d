use ferropt_device::{Buffer, Chip, Device, Lane, Store, Transfer};

use crate::*;

/// What waits for something that is done beside it, if that is not done yet.
fn hold_back(moving: Option<Box<dyn Transfer>>) {
    moving.iter().for_each(|moving| moving.hold_back());
}

/// Memory of the host is copied in while the copy before it is summed up, and sums are copied out.
#[test]
fn what_is_done_beside_other_work_is_there_when_it_is_waited_for() {
    const ROUNDS: usize = 6;
    let (device, len) = (one_device(), 20_011);
    let value = |round: usize, place: usize| (round * 1000 + place % 97) as f32;
    let sources: Vec<_> = (0..ROUNDS)
        .map(|round| {
            let mut source = device.alloc_host::<f32>(len).unwrap();
            let values: Vec<f32> = (0..len).map(|place| value(round, place)).collect();
            device.upload(&mut source, 0, &values);
            source
        })
        .collect();
    let mut places = [(); 2].map(|()| device.alloc::<f32>(len).unwrap());
    let (mut sum, mut out) = (device.alloc::<f32>(len).unwrap(), device.alloc_host::<f32>(len).unwrap());
    let mut coming = [None, None];
    let mut going = None;
    for round in 0..=ROUNDS {
        if round < ROUNDS {
            let place = &mut places[round % 2];
            coming[round % 2] =
                device.beside(Lane::In, &mut || device.copy(len, &sources[round], 0, place, 0));
        }
        let Some(last) = round.checked_sub(1) else { continue };
        hold_back(coming[last % 2].take());
        hold_back(going.take());
        device.accumulate(&places[last % 2], 0, &mut sum, Store::Accumulate);
        // Nothing is left of it but the sum.
        device.fill(&mut places[last % 2], f32::NAN);
        going = device.beside(Lane::Out, &mut || {
            device.accumulate(&sum, 0, &mut out, Store::Accumulate);
        });
    }
    // The processor waits for all.
    let got = out.host().expect("memory of the host");
    for place in 0..len {
        let sums = |rounds: usize| (0..rounds).map(|round| value(round, place)).sum::<f32>();
        assert_eq!(got[place], (1..=ROUNDS).map(sums).sum::<f32>(), "place {place}");
    }
}

/// An emulated GPU does nothing beside other work before somebody waits for it.
#[test]
fn other_work_does_not_wait_for_what_is_done_beside_it() {
    if !emulated() {
        return println!("skipped: only an emulated GPU does it in an order that is known");
    }
    // Another one than other tests wait for meanwhile.
    let device = &Chip::open(Which::Cuda(0), Some(1), false).unwrap();
    let (mut from, mut to) = (put(device, &[1.0; 100]), put(device, &[0.0f32; 100]));
    let moving = device.beside(Lane::In, &mut || device.copy(100, &from, 0, &mut to, 0));
    device.fill(&mut from, 2.0);
    assert_eq!(get(device, &from), [2.0; 100]);
    device.fill(&mut from, 3.0);
    hold_back(moving);
    assert_eq!(get(device, &to), [2.0; 100]);
}
