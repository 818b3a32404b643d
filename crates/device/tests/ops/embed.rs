use ferropt_device::{Device, Element, IGNORE, bf16, f16};

use crate::*;

const ROWS: usize = 77;
const TABLE: usize = 11;
const TABLE2: usize = 5;

fn check_forward<E: Element, O: Element>() {
    for width in WIDTHS {
        let (table, table2) = (numbers::<E>(1, TABLE * width, 1.0), numbers::<E>(2, TABLE2 * width, 1.0));
        let (ids, ids2) = (whole(1, ROWS, TABLE), whole(2, ROWS, TABLE2));
        for both in [false, true] {
            let want: Vec<f32> = (0..ROWS * width)
                .map(|i| {
                    let first = table[ids[i / width] as usize * width + i % width].to_f32();
                    let second = table2[ids2[i / width] as usize * width + i % width].to_f32();
                    O::from_f32(if both { first + second } else { first }).to_f32()
                })
                .collect();
            for (isa, got) in on_every_device(|device| {
                let (ids2, table2) = (put(device, &ids2), put(device, &table2));
                let mut out = poisoned::<O>(device, ROWS * width);
                let second = both.then_some((&ids2, &table2));
                device.embed(ROWS, width, &put(device, &ids), &put(device, &table), second, &mut out);
                vec![get(device, &out)]
            }) {
                assert!(same_bits(&got[0], &want), "{isa:?}: width {width}, both {both}");
            }
        }
    }
}

#[test]
fn rows_are_looked_up_and_added() {
    check_forward::<f32, f32>();
    check_forward::<bf16, f32>();
    check_forward::<bf16, bf16>();
    check_forward::<f16, f32>();
    check_forward::<f16, f16>();
}

fn check_backward<G: Element>() {
    for width in WIDTHS {
        let ids = whole(3, ROWS, TABLE);
        let dout: Vec<G> = numbers(4, ROWS * width, 1.0);
        let start: Vec<f32> = numbers(5, TABLE * width, 1.0);
        // In the order of the rows, in f32: the definition to the bit.
        let mut want = start.clone();
        for (i, id) in ids.iter().enumerate() {
            for c in 0..width {
                want[*id as usize * width + c] += dout[i * width + c].to_f32();
            }
        }
        for (isa, got) in on_every_device(|device| {
            let mut dtable = put(device, &start);
            device.embed_backward(width, &put(device, &ids), &put(device, &dout), &mut dtable);
            vec![get(device, &dtable)]
        }) {
            assert!(same_bits(&got[0], &want), "{isa:?}: width {width}");
        }
    }
}

#[test]
fn gradients_are_added_in_the_order_of_the_rows() {
    check_backward::<f32>();
    check_backward::<bf16>();
    check_backward::<f16>();
}

#[test]
fn rows_beyond_those_asked_for_are_left_alone() {
    on_every_device(|device| {
        let mut out = put(device, &[9.0f32; 6]);
        device.embed(2, 2, &put(device, &[1, 0, 1]), &put(device, &[1.0f32, 2.0, 3.0, 4.0]), None, &mut out);
        assert_eq!(get(device, &out), [3.0, 4.0, 1.0, 2.0, 9.0, 9.0]);
        Vec::new()
    });
}

#[test]
fn ids_without_an_embedding_give_zeros_and_take_no_gradient() {
    let width = 80;
    let ids = [3, IGNORE, 0, IGNORE];
    let table: Vec<bf16> = numbers(1, TABLE * width, 1.0);
    for (isa, got) in on_every_device(|device| {
        let (ids, table) = (put(device, &ids), put(device, &table));
        let mut out = poisoned::<bf16>(device, 4 * width);
        device.embed(4, width, &ids, &table, None, &mut out);
        let mut gradient = put(device, &vec![0.0f32; TABLE * width]);
        device.embed_backward(width, &ids, &put(device, &vec![1.0f32; 4 * width]), &mut gradient);
        vec![get(device, &out), get(device, &gradient)]
    }) {
        let row = |id: usize| table[id * width..][..width].iter().map(|x| x.to_f32());
        let want: Vec<f32> = row(3).chain(vec![0.0; width]).chain(row(0)).chain(vec![0.0; width]).collect();
        assert_eq!(got[0], want, "{isa:?}");
        let touched = |i: usize| [0, 3].contains(&(i / width));
        assert!(got[1].iter().enumerate().all(|(i, g)| *g == touched(i) as u8 as f32), "{isa:?}");
    }
}
