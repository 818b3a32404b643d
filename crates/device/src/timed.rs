//! Where the time of a step goes: a device that notes how long each operation of another takes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use crate::*;

/// Delegates every operation to an inner device. While it is told to, it waits until each is done and adds up wall-clock time by
/// operation: then operations neither overlap nor are started many at once, so that together they take longer than otherwise.
pub struct Timed<D> {
    inner: D,
    measures: AtomicBool,
    nanoseconds: [AtomicU64; NAMES.len()],
}

impl<D: Device> Timed<D> {
    /// A clock around `inner`, at 0, that stands still: operations are those of `inner` and nothing else.
    pub fn new(inner: D) -> Self {
        let nanoseconds = [const { AtomicU64::new(0) }; NAMES.len()];
        Timed { inner, measures: AtomicBool::new(false), nanoseconds }
    }

    /// Lets the clock go from now on, or stand still, once what was asked for before is done.
    pub fn measure(&self, on: bool) {
        self.inner.wait();
        self.measures.store(on, Relaxed);
    }

    /// The device that does the work.
    pub fn inner(&self) -> &D {
        &self.inner
    }

    /// Seconds by operation since the last call, always all operations in the same order; the clock starts anew.
    pub fn take(&self) -> Vec<(&'static str, f64)> {
        NAMES
            .iter()
            .zip(&self.nanoseconds)
            .map(|(name, ns)| (*name, ns.swap(0, Relaxed) as f64 * 1e-9))
            .collect()
    }

    fn time<R>(&self, operation: Operation, run: impl FnOnce(&D) -> R) -> R {
        if !self.measures.load(Relaxed) {
            return run(&self.inner);
        }
        let start = Instant::now();
        let result = run(&self.inner);
        self.inner.wait();
        self.nanoseconds[operation as usize].fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
        result
    }
}

/// The same parameter, as the inner device sees it.
fn inner<'a, D: Device, E: Element>(param: Param<'a, Timed<D>, E>) -> Param<'a, D, E> {
    Param { w: param.w, low: param.low, rounding: param.rounding }
}

/// The same places, as the inner device sees them.
fn same_places<D: Device>(places: Placed<'_, Timed<D>>) -> Placed<'_, D> {
    Placed { rows: places.rows, capacity: places.capacity, words: places.words }
}

/// Writes the delegation of each method of [`Device`] that is an operation, from its signature. `=> expression` after
/// an argument's type says what is passed on instead of the argument.
macro_rules! timed {
    ($(fn $name:ident $(<$($generic:ident),*>)? ($($arg:ident: $type:ty $(=> $pass:expr)?),* $(,)?) $(-> $result:ty)?;)*) => {
        /// Index of each operation's clock.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy)]
        enum Operation { $($name),* }

        const NAMES: &[&str] = &[$(stringify!($name)),*];

        impl<D: Device> Device for Timed<D> {
            type Buf<T: Element> = D::Buf<T>;
            type Packed = D::Packed;

            $(fn $name $(<$($generic: Element),*>)? (&self, $($arg: $type),*) $(-> $result)? {
                self.time(Operation::$name, |d| d.$name($(timed!(@ $arg $($pass)?)),*))
            })*

            fn describe(&self) -> String {
                self.inner.describe()
            }
            fn wait(&self) {
                self.inner.wait();
            }
            fn network(&self) -> Option<anyhow::Result<Box<dyn Network>>> {
                self.inner.network()
            }
            fn repeated(&self, work: &mut dyn FnMut()) {
                // What starts at once cannot be told apart.
                if self.measures.load(Relaxed) { work() } else { self.inner.repeated(work) }
            }
            fn beside(&self, lane: Lane, work: &mut dyn FnMut()) -> Option<Box<dyn Transfer>> {
                self.inner.beside(lane, work)
            }
            fn alloc<T: Element>(&self, len: usize) -> anyhow::Result<Self::Buf<T>> {
                self.inner.alloc(len)
            }
            fn alloc_host<T: Element>(&self, len: usize) -> anyhow::Result<Self::Buf<T>> {
                self.inner.alloc_host(len)
            }
            fn memory_taken(&self) -> Option<u64> {
                self.inner.memory_taken()
            }
            fn workspace_bytes<E: Element>(
                &self,
                rows: usize,
                widest: usize,
                vocab: usize,
                width: usize,
                attention: AttentionShape,
            ) -> usize {
                self.inner.workspace_bytes::<E>(rows, widest, vocab, width, attention)
            }
            fn pack_weight(
                &self,
                format: WeightFormat,
                n: usize,
                k: usize,
                rows: &ReadRows<'_>,
            ) -> anyhow::Result<Self::Packed> {
                self.inner.pack_weight(format, n, k, rows)
            }
            fn pack_random(
                &self,
                format: WeightFormat,
                n: usize,
                k: usize,
                random: RandomWeights,
            ) -> anyhow::Result<Self::Packed> {
                self.inner.pack_random(format, n, k, random)
            }
            fn packed_layout(&self) -> String {
                self.inner.packed_layout()
            }
            fn packed_size(&self, format: WeightFormat, n: usize, k: usize) -> usize {
                self.inner.packed_size(format, n, k)
            }
            fn pack_weight_to(
                &self,
                format: WeightFormat,
                n: usize,
                k: usize,
                rows: &ReadRows<'_>,
                write: &WritePiece<'_>,
            ) -> anyhow::Result<()> {
                self.inner.pack_weight_to(format, n, k, rows, write)
            }
            fn packed_from(
                &self,
                format: WeightFormat,
                n: usize,
                k: usize,
                bytes: Mapped,
            ) -> anyhow::Result<Self::Packed> {
                self.inner.packed_from(format, n, k, bytes)
            }
            fn pack_codes(
                &self,
                format: WeightFormat,
                n: usize,
                k: usize,
                rows: &mut dyn FnMut(std::ops::Range<usize>, quantise::Codes<'_>) -> anyhow::Result<()>,
            ) -> anyhow::Result<Self::Packed> {
                self.inner.pack_codes(format, n, k, rows)
            }
            fn packed_bytes(&self, w: &Self::Packed) -> usize {
                self.inner.packed_bytes(w)
            }
            fn measured_peak<E: Element>(&self) -> f64 {
                self.inner.measured_peak::<E>()
            }
            fn measured_bandwidth(&self) -> anyhow::Result<f64> {
                self.inner.measured_bandwidth()
            }
        }
    };
    (@ $arg:ident) => { $arg };
    (@ $arg:ident $pass:expr) => { $pass };
}

timed! {
    fn embed<E, O>(rows: usize, width: usize, ids: &Self::Buf<u32>, table: &Self::Buf<E>,
        second: Option<(&Self::Buf<u32>, &Self::Buf<E>)>, out: &mut Self::Buf<O>);
    fn embed_backward<G>(width: usize, ids: &Self::Buf<u32>, dout: &Self::Buf<G>, dtable: &mut Self::Buf<f32>);
    fn layer_norm<E>(rows: usize, width: usize, x: &Self::Buf<f32>, gamma: &Self::Buf<f32>, beta: &Self::Buf<f32>,
        y: &mut Self::Buf<E>, y_f32: Option<&mut Self::Buf<f32>>, mean: &mut Self::Buf<f32>,
        rstd: &mut Self::Buf<f32>);
    fn layer_norm_backward<G>(width: usize, dy: &Self::Buf<G>, x: &Self::Buf<f32>, mean: &Self::Buf<f32>,
        rstd: &Self::Buf<f32>, gamma: &Self::Buf<f32>, dx: &mut Self::Buf<f32>, dx_store: Store,
        dgamma: &mut Self::Buf<f32>, dbeta: &mut Self::Buf<f32>, grad_store: Store);
    fn linear<E, O>(s: LinearShape, x: &Self::Buf<E>, w: &Self::Buf<E>, bias: Option<&Self::Buf<f32>>,
        act: Activation, y: &mut Self::Buf<O>);
    fn linear_residual<E>(s: LinearShape, x: &Self::Buf<E>, w: &Self::Buf<E>, bias: Option<&Self::Buf<f32>>,
        dropout: Option<Dropout>, residual: &Self::Buf<f32>, out: &mut Self::Buf<f32>);
    fn packed_linear<E, O>(m: usize, x: &Self::Buf<E>, w: &Self::Packed, bias: Option<&Self::Buf<f32>>,
        act: Activation, y: &mut Self::Buf<O>);
    fn packed_linear_residual<E>(m: usize, x: &Self::Buf<E>, w: &Self::Packed, bias: Option<&Self::Buf<f32>>,
        residual: &Self::Buf<f32>, out: &mut Self::Buf<f32>);
    fn packed_embed(rows: usize, ids: &Self::Buf<u32>, w: &Self::Packed, second: Option<(&Self::Buf<u32>, &Self::Buf<f32>)>,
        out: &mut Self::Buf<f32>);
    fn linear_backward_input<E, O>(s: LinearShape, dy: &Self::Buf<E>, w: &Self::Buf<E>,
        relu_output: Option<&Self::Buf<E>>, dx: &mut Self::Buf<O>);
    fn linear_backward_weight<E>(s: LinearShape, dy: &Self::Buf<E>, x: &Self::Buf<E>, dw: &mut Self::Buf<f32>,
        dbias: Option<&mut Self::Buf<f32>>, store: Store);
    fn residual<E>(rows: usize, width: usize, branch: &Self::Buf<E>, bias: Option<&Self::Buf<f32>>,
        dropout: Option<Dropout>, residual: &Self::Buf<f32>, out: &mut Self::Buf<f32>);
    fn residual_backward<E>(width: usize, dres: &Self::Buf<f32>, dropout: Option<Dropout>, dy: &mut Self::Buf<E>);
    fn attention<E>(s: AttentionShape, qkv: &Self::Buf<E>, doc_start: Option<&Self::Buf<u32>>,
        dropout: Option<Dropout>, out: &mut Self::Buf<E>, lse: &mut Self::Buf<f32>);
    fn attention_backward<E>(s: AttentionShape, qkv: &Self::Buf<E>, doc_start: Option<&Self::Buf<u32>>,
        dropout: Option<Dropout>, out: &Self::Buf<E>, lse: &Self::Buf<f32>, dout: &Self::Buf<E>,
        dqkv: &mut Self::Buf<E>);
    fn attention_paged<E>(heads: usize, width: usize, places: Placed<'_, Self> => same_places(places),
        qkv: &Self::Buf<E>,
        k_pages: &mut Self::Buf<E>, v_pages: &mut Self::Buf<E>, out: &mut Self::Buf<E>);
    fn copy_blocks<T>(size: usize, pairs: &[(u32, u32)], x: &mut Self::Buf<T>);
    fn log_sum_exp(rows: usize, width: usize, x: &Self::Buf<f32>, lse: &mut Self::Buf<f32>,
        largest: &mut Self::Buf<u32>);
    fn draw(width: usize, known: usize, logits: &Self::Buf<f32>, draws: &[(usize, Draw)]) -> Vec<u32>;
    fn each_task(tasks: usize, task: &(dyn Fn(usize) + Sync));
    fn lm_loss<E>(s: LossShape, h: &Self::Buf<E>, w: &Self::Buf<E>, targets: &Self::Buf<u32>,
        combine: Option<&mut Combine<'_>>, losses: &mut Self::Buf<f32>);
    fn lm_loss_backward<E>(s: LossShape, h: &Self::Buf<E>, w: &Self::Buf<E>, targets: &Self::Buf<u32>,
        combine: Option<&mut Combine<'_>>, scale: f32, losses: &mut Self::Buf<f32>, dh: &mut Self::Buf<E>, dw: &mut Self::Buf<f32>, store: Store);
    fn sums_of_squares(xs: Vec<&Self::Buf<f32>>) -> Vec<f64>;
    fn adamw<E>(hyper: AdamW, param: Param<'_, Self, E> => inner(param), grad: &Self::Buf<f32>,
        m: &mut Self::Buf<f32>, v: &mut Self::Buf<f32>);
    fn sgd<E>(hyper: Sgd, param: Param<'_, Self, E> => inner(param), grad: &Self::Buf<f32>,
        momentum: Option<&mut Self::Buf<f32>>);
    fn set_master<E>(param: Param<'_, Self, E> => inner(param), values: &[f32]);
    fn get_master<E>(w: &Self::Buf<E>, low: Option<&Self::Buf<i16>>, values: &mut [f32]);
    fn copy<T>(len: usize, src: &Self::Buf<T>, from: usize, dst: &mut Self::Buf<T>, to: usize);
    fn accumulate(src: &Self::Buf<f32>, from: usize, dst: &mut Self::Buf<f32>, store: Store);
    fn cast<S, T>(src: &Self::Buf<S>, dst: &mut Self::Buf<T>);
    fn fill<T>(dst: &mut Self::Buf<T>, value: T);
    fn upload<T>(dst: &mut Self::Buf<T>, offset: usize, src: &[T]);
    fn download<T>(src: &Self::Buf<T>, offset: usize, dst: &mut [T]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{CpuDevice, CpuOptions};

    /// A cast, a product, a step of the optimiser, and what they leave.
    fn work<D: Device>(d: &D) -> (Vec<f32>, f64) {
        let buf = |values: &[f32]| {
            let mut buf = d.alloc::<f32>(values.len()).expect("memory");
            d.upload(&mut buf, 0, values);
            buf
        };
        let (x, mut w, mut y) =
            (buf(&[1.0, -2.0, 3.0, 4.0]), buf(&[0.5, 2.0, -1.0, 1.5]), buf(&[f32::NAN; 4]));
        let s = LinearShape { m: 2, n: 2, k: 2 };
        d.linear(s, &x, &w, None, Activation::Relu, &mut y);
        let hyper = Sgd { lr: 0.1, momentum: 0.0, weight_decay: 0.01, grad_scale: 1.0 };
        d.sgd(hyper, Param { w: &mut w, low: None, rounding: None }, &y, None);
        let mut low = d.alloc::<bf16>(4).expect("memory");
        d.cast(&w, &mut low);
        let mut values = vec![bf16::ZERO; 4];
        d.download(&low, 0, &mut values);
        (values.into_iter().map(bf16::to_f32).collect(), d.sums_of_squares(vec![&y])[0])
    }

    #[test]
    fn results_are_those_of_the_inner_device() {
        let inner = CpuDevice::new(CpuOptions::default()).expect("a device");
        let want = work(&inner);
        let timed = Timed::new(inner);
        for measured in [false, true] {
            timed.measure(measured);
            assert_eq!(work(&timed), want);
        }
        assert_eq!(timed.describe(), timed.inner().describe());
    }

    #[test]
    fn times_of_what_ran_add_up_and_start_anew() {
        let timed = Timed::new(CpuDevice::new(CpuOptions::default()).expect("a device"));
        let mut x = timed.alloc::<f32>(1 << 20).expect("memory");
        timed.fill(&mut x, 1.0);
        assert!(timed.take().iter().all(|(_, seconds)| *seconds == 0.0), "nobody has asked for it yet");
        timed.measure(true);
        let start = Instant::now();
        for i in 0..20 {
            timed.fill(&mut x, i as f32);
        }
        timed.sums_of_squares(vec![&x]);
        let wall = start.elapsed().as_secs_f64();
        let times = timed.take();
        let total: f64 = times.iter().map(|(_, seconds)| seconds).sum();
        // Nothing but the operations happened between the two looks at the clock.
        assert!(total <= wall && total > 0.5 * wall, "{total} of {wall} s");
        for (name, seconds) in &times {
            assert_eq!(*seconds > 0.0, ["fill", "sums_of_squares"].contains(name), "{name}: {seconds} s");
        }
        let names = |times: &[(&'static str, f64)]| times.iter().map(|t| t.0).collect::<Vec<_>>();
        let again = timed.take();
        assert_eq!(names(&again), names(&times));
        assert!(again.iter().all(|(_, seconds)| *seconds == 0.0));
    }
}
