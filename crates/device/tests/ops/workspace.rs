//! Workspace: what operations take beside their arguments is what is announced.

use ferropt_device::{
    Activation, AttentionShape, Device, Element, LinearShape, LossShape, PAGE, Places, Segment, Store, bf16,
    f16,
};

use crate::*;

/// Runs all operations that take workspace, for so many rows of a model of these sizes, and returns the shape of its attention.
fn take_workspace<E: Element>(
    device: &Chip,
    rows: usize,
    width: usize,
    widest: usize,
    vocab: usize,
) -> AttentionShape {
    let zeros = |len| device.alloc::<E>(len).expect("memory");
    let zeros_f32 = |len| device.alloc::<f32>(len).expect("memory");
    let store = Store::Overwrite;
    for (n, k) in [(widest, width), (width, widest)] {
        let s = LinearShape { m: rows, n, k };
        let (x, w, mut y, bias) = (zeros(rows * k), zeros(n * k), zeros(rows * n), zeros_f32(n));
        device.linear(s, &x, &w, Some(&bias), Activation::Relu, &mut y);
        device.linear_backward_input(s, &y, &w, None, &mut zeros(rows * k));
        device.linear_backward_weight(s, &y, &x, &mut zeros_f32(n * k), Some(&mut zeros_f32(n)), store);
    }
    let (x, per_row, per_column) = (zeros_f32(rows * width), zeros_f32(rows), zeros_f32(width));
    let (mut dx, mut dgamma, mut dbeta) = (zeros_f32(rows * width), zeros_f32(width), zeros_f32(width));
    let (dx, dgamma, dbeta) = (&mut dx, &mut dgamma, &mut dbeta);
    let (mean, rstd, gamma) = (&per_row, &per_row, &per_column);
    device.layer_norm_backward(width, &x, &x, mean, rstd, gamma, dx, store, dgamma, dbeta, store);
    let s = LossShape { rows, vocab, width, first: 0 };
    let (h, w, targets) =
        (zeros(rows * width), zeros(vocab * width), device.alloc::<u32>(rows).expect("memory"));
    let (mut losses, mut dh, mut dw) = (zeros_f32(rows), zeros(rows * width), zeros_f32(vocab * width));
    device.lm_loss_backward(s, &h, &w, &targets, None, 1.0, &mut losses, &mut dh, &mut dw, store);

    let shape = AttentionShape { batch: 1, seq: rows, heads: 2, width: width / 2, among: (0, 2) };
    let (qkv, out) = (zeros(rows * 3 * width), zeros(rows * width));
    let lse = zeros_f32(2 * rows);
    device.attention(shape, &qkv, None, None, &mut zeros(rows * width), &mut zeros_f32(2 * rows));
    device.attention_backward(shape, &qkv, None, None, &out, &lse, &out, &mut zeros(rows * 3 * width));
    if E::DTYPE == DType::F16 {
        // Texts are never generated in it.
        return shape;
    }
    let pages: Vec<u32> = (0..rows.div_ceil(PAGE) as u32).collect();
    let (mut k, mut v) = (zeros(pages.len() * PAGE * width), zeros(pages.len() * PAGE * width));
    let mut places = Places::new(device, rows, pages.len()).expect("memory");
    places.put(device, &[Segment { rows, past: 0, pages: &pages }], pages.len());
    device.attention_paged(2, width / 2, places.placed(), &qkv, &mut k, &mut v, &mut zeros(rows * width));
    shape
}

fn check<E: Element>(rows: usize, width: usize, widest: usize, vocab: usize) {
    // One of its own, for others' workspace is kept.
    let which = std::env::var("FERROPT_TEST_DEVICE")
        .map_or(Which::Cpu, |name| name.parse().expect("a device's name"));
    let device = Chip::open(which, None, false).expect("a device");
    let shape = take_workspace::<E>(&device, rows, width, widest, vocab);
    let (taken, announced) =
        (device.workspace_taken(), device.workspace_bytes::<E>(rows, widest, vocab, width, shape));
    let what = format!("{}, {rows} rows, {width} to {widest}, {vocab}", E::DTYPE);
    assert!(taken <= announced, "{what}: took {taken}, said {announced}");
    if which == Which::Cpu {
        // Packed operands are counted at their largest, up to 8 MiB each.
        assert!(
            announced < 2 * taken + (24 << 20),
            "{what}: {announced} announced for {taken} is no estimate"
        );
    }
}

#[test]
fn workspace_is_at_most_what_is_announced() {
    let sizes = [
        (1, 8, 32, 50),
        (100, 64, 256, 1000),
        (300, 96, 384, 3000),
        (700, 96, 384, 9000),
        (2100, 48, 1200, 300),
    ];
    for (rows, width, widest, vocab) in sizes {
        if emulated() && rows > 500 {
            continue;
        }
        check::<f32>(rows, width, widest, vocab);
        check::<bf16>(rows, width, widest, vocab);
        check::<f16>(rows, width, widest, vocab);
    }
}
