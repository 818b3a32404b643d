//! Operations that are repeated: on a GPU they become a graph, which must do what they do now, not what they did once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ferropt_device::cuda::{CudaDevice, CudaOptions};
use ferropt_device::{
    Activation, Chip, ChipBuf, ChipPacked, Device, Dropout, LinearShape, PAGE, Places, Segment, Store,
    WeightFormat, bf16, rng,
};

use crate::{get, gpu, numbers, one_device, poisoned, put, same_bits, whole};

const ROWS: usize = 3;
const WIDTH: usize = 16;
const HEADS: usize = 2;
const TOKENS: usize = 50;
const PAGES: usize = 4;

/// Every kind of work that a sequence can have: kernels with and without workspace, products, copies and fills.
struct Sequence {
    ids: ChipBuf<u32>,
    places: Places<Chip>,
    table: ChipBuf<f32>,
    weight: ChipBuf<f32>,
    codes: ChipPacked,
    bias: ChipBuf<f32>,
    embedded: ChipBuf<f32>,
    qkv: ChipBuf<f32>,
    k: ChipBuf<f32>,
    v: ChipBuf<f32>,
    out: ChipBuf<f32>,
    low: ChipBuf<bf16>,
    sums: ChipBuf<f32>,
    /// The step whose random masks are used.
    step: usize,
}

impl Sequence {
    fn new(device: &Chip) -> Sequence {
        let rows = |rows: std::ops::Range<usize>, out: &mut [f32]| {
            let all = numbers::<f32>(7, 3 * WIDTH * WIDTH, 1.0);
            out.copy_from_slice(&all[rows.start * WIDTH..rows.end * WIDTH]);
            Ok(())
        };
        let cache = || put(device, &vec![0.0f32; PAGES * PAGE * WIDTH]);
        Sequence {
            ids: poisoned(device, ROWS),
            places: Places::new(device, ROWS, PAGES).expect("memory"),
            table: put(device, &numbers(1, TOKENS * WIDTH, 1.0)),
            weight: put(device, &numbers(2, WIDTH * WIDTH, 0.3)),
            codes: device.pack_weight(WeightFormat::Int8, 3 * WIDTH, WIDTH, &rows).expect("memory"),
            bias: put(device, &numbers(3, WIDTH, 1.0)),
            embedded: poisoned(device, ROWS * WIDTH),
            qkv: poisoned(device, ROWS * 3 * WIDTH),
            k: cache(),
            v: cache(),
            out: poisoned(device, ROWS * WIDTH),
            low: poisoned(device, ROWS * WIDTH),
            sums: put(device, &[0.0f32; ROWS * WIDTH]),
            step: 0,
        }
    }

    /// What differs each time: the rows, and where two texts are, of which the second grows by a row.
    fn contents(&mut self, device: &Chip, round: usize) {
        device.upload(&mut self.ids, 0, &whole(round, ROWS, TOKENS));
        let first: &[u32] = if round.is_multiple_of(2) { &[2, 0] } else { &[3] };
        let segments = [
            Segment { rows: 2, past: if first.len() == 2 { 63 } else { round }, pages: first },
            Segment { rows: 1, past: round, pages: &[1] },
        ];
        self.places.put(device, &segments, PAGES);
    }

    fn operations(&mut self, device: &Chip) {
        let s = LinearShape { m: ROWS, n: WIDTH, k: WIDTH };
        device.fill(&mut self.out, f32::NAN);
        device.embed(ROWS, WIDTH, &self.ids, &self.table, None, &mut self.embedded);
        device.packed_linear(ROWS, &self.embedded, &self.codes, None, Activation::Identity, &mut self.qkv);
        let (places, width) = (self.places.placed(), WIDTH / HEADS);
        device.attention_paged(HEADS, width, places, &self.qkv, &mut self.k, &mut self.v, &mut self.out);
        // With an epilogue, which has workspace, and without.
        device.linear(s, &self.out, &self.weight, Some(&self.bias), Activation::Relu, &mut self.embedded);
        device.linear(s, &self.embedded, &self.weight, None, Activation::Identity, &mut self.out);
        device.cast(&self.out, &mut self.low);
        device.copy(WIDTH, &self.out, 0, &mut self.embedded, WIDTH);
        let stream = rng::Stream::new(4, rng::Purpose::DropoutFeedForward, 0, self.step as u64);
        let dropout = Some(Dropout { stream, first_row: self.step as u64, p: 0.5 });
        device.residual(ROWS, WIDTH, &self.low, None, dropout, &self.embedded, &mut self.out);
        device.accumulate(&self.embedded, 0, &mut self.sums, Store::Accumulate);
    }

    fn results(&self, device: &Chip) -> Vec<Vec<f32>> {
        vec![get(device, &self.out), get(device, &self.low), get(device, &self.sums), get(device, &self.k)]
    }

    fn plainly(&mut self, device: &Chip, round: usize) -> Vec<Vec<f32>> {
        self.contents(device, round);
        self.operations(device);
        self.results(device)
    }

    fn repeated(&mut self, device: &Chip, round: usize) -> Vec<Vec<f32>> {
        self.contents(device, round);
        device.repeated(&mut || self.operations(device));
        self.results(device)
    }
}

fn same(what: &str, got: &[Vec<f32>], want: &[Vec<f32>]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(got.iter().all(|x| x.is_finite()), "{what}: output {i} is not finite");
        assert!(same_bits(got, want), "{what}: output {i} differs");
    }
}

/// A GPU of its own, where one is tested, so that nothing else counts.
fn own(graphs: bool) -> Option<Chip> {
    gpu()?;
    let options = CudaOptions { threads: Some(1), graphs: Some(graphs) };
    Some(Chip::Cuda(Box::new(CudaDevice::new(0, options).expect("the device that is to be tested"))))
}

fn started(device: &Chip) -> Option<u64> {
    match device {
        Chip::Cuda(device) => Some(device.graphs_started()),
        Chip::Cpu(_) => None,
    }
}

#[test]
fn repeated_operations_have_the_bits_of_single_ones() {
    let own = own(true);
    let device = own.as_ref().unwrap_or_else(|| one_device());
    let (mut single, mut again) = (Sequence::new(device), Sequence::new(device));
    for round in 0..6 {
        let want = single.plainly(device, round);
        same(&format!("round {round}"), &again.repeated(device, round), &want);
        if let Some(started) = started(device) {
            assert_eq!(
                started, round as u64,
                "graphs after round {round}: the second time is the first one's"
            );
        }
    }
}

#[test]
fn what_a_few_kernels_are_told_may_differ() {
    let own = own(true);
    let device = own.as_ref().unwrap_or_else(|| one_device());
    let (mut single, mut again) = (Sequence::new(device), Sequence::new(device));
    for round in 0..6 {
        (single.step, again.step) = (round, round);
        let want = single.plainly(device, round);
        same(&format!("round {round}"), &again.repeated(device, round), &want);
    }
    assert!(started(device).is_none_or(|started| started == 5), "{:?} graphs", started(device));
    // What has nothing in common does not take another's graph away, and either may come again.
    let mut filled = poisoned::<f32>(device, 5);
    for round in 0..3 {
        for value in [1.0, 2.0] {
            device.repeated(&mut || device.fill(&mut filled, value));
            assert_eq!(get(device, &filled), [value; 5], "round {round}");
        }
    }
    assert!(started(device).is_none_or(|started| started == 9), "{:?} graphs", started(device));
}

#[test]
fn without_graphs_operations_run_as_they_are() {
    let Some(device) = own(false) else { return };
    let (mut single, mut again) = (Sequence::new(&device), Sequence::new(&device));
    for round in 0..3 {
        let want = single.plainly(&device, round);
        same(&format!("round {round}"), &again.repeated(&device, round), &want);
    }
    assert_eq!(started(&device), Some(0));
}

#[test]
fn what_moved_is_found_where_it_is() {
    let own = own(true);
    let device = own.as_ref().unwrap_or_else(|| one_device());
    let mut single = Sequence::new(device);
    let wide = |rows: std::ops::Range<usize>, out: &mut [f32]| {
        out.copy_from_slice(&numbers::<f32>(9, rows.len() * 4096, 1.0));
        Ok(())
    };
    let large = device.pack_weight(WeightFormat::Int8, 4, 4096, &wide).expect("memory");
    let mut round = 0;
    for turn in 0..3 {
        // Other buffers, where those of the last turn may have been, and with other sums in them.
        let mut again = Sequence::new(device);
        single = if turn == 0 { single } else { Sequence::new(device) };
        for _ in 0..4 {
            let want = single.plainly(device, round);
            same(&format!("turn {turn}, round {round}"), &again.repeated(device, round), &want);
            round += 1;
        }
        // More workspace than before.
        let rows = 64 << turn;
        let x = put(device, &numbers::<f32>(8, rows * 4096, 1.0));
        let mut y = poisoned::<f32>(device, rows * 4);
        device.packed_linear(rows, &x, &large, None, Activation::Identity, &mut y);
        let want = single.plainly(device, round);
        same(&format!("turn {turn}, workspace moved"), &again.repeated(device, round), &want);
        round += 1;
    }
    assert!(started(device).is_none_or(|started| started >= 9), "{:?} graphs", started(device));
}

#[test]
fn what_cannot_be_repeated_is_refused() {
    let Some(device) = own(true) else { return };
    let mut sequence = Sequence::new(&device);
    let refused = |what: &str, work: &mut dyn FnMut()| {
        let result = catch_unwind(AssertUnwindSafe(|| device.repeated(work)));
        let message = *result.expect_err(what).downcast::<String>().expect("a message");
        assert!(message.starts_with(what) && message.contains("Device::repeated"), "{message}");
    };
    let (mut x, mut values) = (put(&device, &[0.0f32; 4]), [0.0f32; 4]);
    refused("an upload", &mut || device.upload(&mut x, 0, &[1.0]));
    refused("a download", &mut || device.download(&x, 0, &mut values));
    refused("waiting for the GPU", &mut || device.wait());
    refused("making a buffer", &mut || drop(device.alloc::<f32>(1)));
    // Nothing is left of it.
    let mut single = Sequence::new(&device);
    for round in 0..3 {
        let want = single.plainly(&device, round);
        same(&format!("round {round}"), &sequence.repeated(&device, round), &want);
    }
    assert_eq!(started(&device), Some(2));
    // Nor is anything repeated that uses a buffer which ends on the way.
    let mut parts: Vec<ChipBuf<f32>> = (0..8).map(|_| put(&device, &[1.0f32; 4])).collect();
    for _ in 0..4 {
        device.repeated(&mut || {
            let mut part = parts.pop().expect("two for each time");
            device.fill(&mut part, 2.0);
        });
    }
    assert_eq!(started(&device), Some(2));
}
