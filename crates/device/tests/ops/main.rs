//! Every operation against its definition in f64 (or, where the definition says so, to the bit). On the processor with each
//! instruction set that it has, and one, two and three threads, which must agree to the bit. With `FERROPT_TEST_DEVICE=cuda`
//! on a GPU instead, twice, which must agree to the bit too. Outputs are filled with NaN first, so that an element that is
//! not written shows.

mod attention;
mod beside;
mod draw;
mod elementwise;
mod embed;
mod host;
mod layer_norm;
mod linear;
mod lm_loss;
mod log_sum_exp;
mod optimizer;
mod packed;
mod repeated;
mod workspace;

use std::sync::OnceLock;

use ferropt_device::cpu::{CpuDevice, CpuOptions, Isa};
use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{Buffer, Chip, ChipBuf, DType, Device, Element, Which};

/// Row widths: smaller than a register, not a multiple of one, of one model, of none.
const WIDTHS: [usize; 5] = [1, 7, 80, 768, 1000];

/// The GPU to test, if it is a GPU that is tested. One for all tests: opening it takes a moment.
fn gpu() -> Option<&'static Chip> {
    static GPU: OnceLock<Option<Chip>> = OnceLock::new();
    let open = || {
        let name = std::env::var("FERROPT_TEST_DEVICE").ok()?;
        let which: Which = name.parse().expect("a device's name in FERROPT_TEST_DEVICE");
        (which != Which::Cpu)
            .then(|| Chip::open(which, None, false).expect("the device that is to be tested"))
    };
    GPU.get_or_init(open).as_ref()
}

/// Whether the GPU is one that the processor plays, for which large products take too long.
fn emulated() -> bool {
    gpu().is_some_and(|gpu| gpu.describe().contains("emulated"))
}

/// Runs `f` on every instruction set with 1, 2 and 3 threads, demands the same bits from all thread numbers, and
/// returns the outputs by instruction set; or on a GPU.
fn on_every_device(f: impl Fn(&Chip) -> Vec<Vec<f32>>) -> Vec<(String, Vec<Vec<f32>>)> {
    let same = |name: &str, one: &[Vec<f32>], other: Vec<Vec<f32>>| {
        for (i, (a, b)) in one.iter().zip(other).enumerate() {
            assert!(same_bits(a, &b), "{name}: output {i} differs");
        }
    };
    if let Some(gpu) = gpu() {
        let one = f(gpu);
        same("two runs on the GPU", &one, f(gpu));
        return vec![("cuda".to_string(), one)];
    }
    Isa::available()
        .into_iter()
        .map(|isa| {
            let run = |threads| f(&processor(isa, threads));
            let one = run(1);
            for threads in [2, 3] {
                same(&format!("{isa:?} with 1 and {threads} threads"), &one, run(threads));
            }
            (format!("{isa:?}"), one)
        })
        .collect()
}

fn processor(isa: Isa, threads: usize) -> Chip {
    let options = CpuOptions { isa: Some(isa), threads: Some(threads), pin: false };
    Chip::Cpu(CpuDevice::new(options).expect("an available instruction set"))
}

/// A device, for what is the same on all.
fn one_device() -> &'static Chip {
    static CPU: OnceLock<Chip> = OnceLock::new();
    gpu().unwrap_or_else(|| CPU.get_or_init(|| Chip::open(Which::Cpu, None, false).expect("a device")))
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Normal numbers of a fixed stream, representable in `E`.
fn numbers<E: Element>(which: usize, len: usize, std: f32) -> Vec<E> {
    let stream = Stream::new(42, Purpose::Init, which, 0);
    (0..len).map(|i| E::from_f32(std * stream.normal(0, i))).collect()
}

/// Whole numbers below `below`.
fn whole(which: usize, len: usize, below: usize) -> Vec<u32> {
    let stream = Stream::new(43, Purpose::Sampling, which, 0);
    (0..len).map(|i| stream.word(0, i) % below as u32).collect()
}

fn put<T: Element>(device: &Chip, values: &[T]) -> ChipBuf<T> {
    let mut buf = device.alloc(values.len()).expect("memory");
    device.upload(&mut buf, 0, values);
    buf
}

fn poisoned<T: Element>(device: &Chip, len: usize) -> ChipBuf<T> {
    put(device, &vec![T::from_f32(f32::NAN); len])
}

fn get<T: Element>(device: &Chip, buf: &ChipBuf<T>) -> Vec<f32> {
    let mut values = vec![T::default(); buf.len()];
    device.download(buf, 0, &mut values);
    values.into_iter().map(T::to_f32).collect()
}

fn widen<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| v.to_f32() as f64).collect()
}

/// Relative error of rounding to a type.
fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 1.0 / 256.0,
        DType::F16 => 1.0 / 2048.0,
        _ => UNIT,
    }
}

/// Absolute error of rounding to a type numbers that are too small for the relative one.
fn smallest(dtype: DType) -> f64 {
    if dtype == DType::F16 { UNIT / 2.0 } else { 0.0 }
}

/// Relative error of one f32 operation.
const UNIT: f64 = 1.0 / (1 << 24) as f64;

/// `got` is `want` rounded to `dtype`, give or take `slack(i)`, which is what the operation's own steps may add up to.
fn assert_close(what: &str, dtype: DType, got: &[f32], want: &[f64], slack: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let allowed = unit(dtype) * want.abs() + slack(i) * (1.0 + unit(dtype)) + smallest(dtype);
        let error = (*got as f64 - want).abs();
        // Written so that a NaN fails.
        assert!(
            error <= allowed,
            "{what}: element {i} is {got}, not {want}; off by {error:e}, allowed {allowed:e}"
        );
    }
}

#[test]
fn the_measured_bandwidth_is_one() {
    let bandwidth = one_device().measured_bandwidth().expect("memory");
    // Of memory, disks are slower and registers faster.
    assert!((1e8..1e13).contains(&bandwidth), "{bandwidth:e} bytes/s");
}

#[test]
fn the_measured_peak_is_a_speed() {
    let devices: Vec<Chip> = Isa::available().into_iter().map(|isa| processor(isa, 1)).collect();
    for device in gpu().map_or(devices.iter().collect::<Vec<_>>(), |gpu| vec![gpu]) {
        for peak in [device.measured_peak::<f32>(), device.measured_peak::<ferropt_device::bf16>()] {
            // A processor of 2010 did more, and none of today's chips reaches the upper bound.
            assert!((2e8..1e16).contains(&peak), "{}: {peak:e} FLOP/s", device.describe());
        }
    }
}
