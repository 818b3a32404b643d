use ferropt_device::{AdamW, Buffer, ChipBuf, Device, Element, Param, Store, bf16};

use crate::*;

fn put_on_host<T: Element>(device: &Chip, values: &[T]) -> ChipBuf<T> {
    let mut buf = device.alloc_host(values.len()).expect("memory");
    device.upload(&mut buf, 0, values);
    buf
}

#[test]
fn memory_of_the_host_is_zero_and_is_copied_from_and_to() {
    let device = one_device();
    assert_eq!(get(device, &device.alloc_host::<f32>(1000).unwrap()), vec![0.0; 1000]);
    assert!(device.alloc_host::<f32>(0).unwrap().host().is_some_and(<[f32]>::is_empty));
    let (a, b): (Vec<f32>, Vec<f32>) = (numbers(1, 1000, 1.0), numbers(2, 1000, 1.0));
    let mut want = b.clone();
    want[300..900].copy_from_slice(&a[100..700]);
    for put_a in [put::<f32>, put_on_host::<f32>] {
        for put_b in [put::<f32>, put_on_host::<f32>] {
            let (from, mut to) = (put_a(device, &a), put_b(device, &b));
            device.copy(600, &from, 100, &mut to, 300);
            assert_eq!(get(device, &to), want);
            device.accumulate(&from, 0, &mut to, Store::Accumulate);
            let sums: Vec<f32> = want.iter().zip(&a).map(|(x, y)| x + y).collect();
            assert_eq!(get(device, &to), sums);
            device.accumulate(&from, 0, &mut to, Store::Overwrite);
            assert_eq!(get(device, &to), a);
        }
    }
    // The processor sees what was computed, and what it writes is computed with.
    let mut sum = put_on_host(device, &a);
    device.accumulate(&put(device, &b), 0, &mut sum, Store::Accumulate);
    let seen: Vec<f32> = sum.host().expect("memory of the host").to_vec();
    assert_eq!(seen, a.iter().zip(&b).map(|(x, y)| x + y).collect::<Vec<_>>());
    sum.host_mut().expect("memory of the host").fill(2.0);
    assert_eq!(device.sums_of_squares(vec![&sum]), [4000.0]);
}

#[test]
fn updates_of_the_hosts_memory_have_the_same_bits() {
    let len = 5003;
    let (start, gradient): (Vec<f32>, Vec<f32>) = (numbers(3, len, 0.5), numbers(4, len, 0.02));
    let hyper = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 0.1,
        bias_correction2: 0.05,
        grad_scale: 0.5,
    };
    let device = one_device();
    let stepped = |on_host: bool| {
        let f32s = if on_host { put_on_host::<f32> } else { put::<f32> };
        let (mut w, mut low) = match on_host {
            true => (device.alloc_host::<bf16>(len).unwrap(), device.alloc_host::<i16>(len).unwrap()),
            false => (device.alloc(len).unwrap(), device.alloc(len).unwrap()),
        };
        let (mut m, mut v) = (f32s(device, &vec![0.0; len]), f32s(device, &vec![0.0; len]));
        let g = f32s(device, &gradient);
        device.set_master(Param { w: &mut w, low: Some(&mut low), rounding: None }, &start);
        for _ in 0..2 {
            let param = Param { w: &mut w, low: Some(&mut low), rounding: None };
            device.adamw(hyper, param, &g, &mut m, &mut v);
        }
        let mut master = vec![f32::NAN; len];
        device.get_master(&w, Some(&low), &mut master);
        (vec![master, get(device, &m), get(device, &v)], device.sums_of_squares(vec![&g])[0].to_bits())
    };
    let (here, there) = (stepped(false), stepped(true));
    assert!(here.0.iter().zip(&there.0).all(|(a, b)| same_bits(a, b)));
    assert_eq!(here.1, there.1);
}

#[test]
fn taken_memory_is_counted_where_the_device_has_its_own() {
    let device = match std::env::var("FERROPT_TEST_DEVICE") {
        // Another one than other tests work on meanwhile.
        Ok(name) => Chip::open(name.parse().unwrap(), Some(1), false).unwrap(),
        Err(_) => Chip::open(Which::Cpu, Some(1), false).unwrap(),
    };
    let Some(before) = device.memory_taken() else {
        return assert!(matches!(device, Chip::Cpu(_)));
    };
    let (own, hosts) = (device.alloc::<f32>(1000).unwrap(), device.alloc_host::<f32>(1000).unwrap());
    assert_eq!(device.memory_taken(), Some(before + 4000));
    drop((own, hosts));
    assert_eq!(device.memory_taken(), Some(before));
}
