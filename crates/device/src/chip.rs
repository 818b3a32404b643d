//! The device that a program runs on, chosen when it starts: what is above is compiled once for all of them.

use crate::cpu::{CpuBuf, CpuDevice, CpuOptions, Packed};
use crate::cuda::{CudaBuf, CudaDevice, CudaOptions, CudaPacked};
use crate::*;

/// Which device, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Which {
    /// `cpu`: the processor.
    #[default]
    Cpu,
    /// `cuda`, `cuda:1`: an NVIDIA GPU by its number, 0 being the first.
    Cuda(usize),
}

impl std::str::FromStr for Which {
    type Err = String;

    fn from_str(name: &str) -> Result<Which, String> {
        match (name, name.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Which::Cpu),
            ("cuda", _) => Ok(Which::Cuda(0)),
            (_, Some(Ok(number))) => Ok(Which::Cuda(number)),
            _ => Err(format!("{name:?} is no device; expected cpu, cuda or cuda:N for the N-th GPU")),
        }
    }
}

impl std::fmt::Display for Which {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Which::Cpu => f.write_str("cpu"),
            Which::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// One of the devices there are.
pub enum Chip {
    /// The processor.
    Cpu(CpuDevice),
    /// An NVIDIA GPU.
    Cuda(Box<CudaDevice>),
}

/// Memory of a [`Chip`].
pub enum ChipBuf<T: Element> {
    /// Of the processor.
    Cpu(CpuBuf<T>),
    /// Of a GPU.
    Cuda(CudaBuf<T>),
}

/// A weight matrix laid out for a [`Chip`].
pub enum ChipPacked {
    /// For the processor.
    Cpu(Packed),
    /// For a GPU.
    Cuda(CudaPacked),
}

impl Chip {
    /// Opens a device; `threads` of the processor (all available when absent) do its work, or what is beside a GPU's, and
    /// `pin` binds them to processors where the device is the processor.
    ///
    /// # Errors
    /// When the number of threads is out of range, the processor cannot be used as the environment asks (`FERROPT_ISA`), or
    /// there is no such GPU or a library for it is missing.
    pub fn open(which: Which, threads: Option<usize>, pin: bool) -> anyhow::Result<Chip> {
        match which {
            Which::Cpu => CpuDevice::new(CpuOptions { threads, pin, ..CpuOptions::default() }).map(Chip::Cpu),
            Which::Cuda(number) => CudaDevice::new(number, CudaOptions { threads, graphs: None })
                .map(|device| Chip::Cuda(Box::new(device)))
                .map_err(|error| anyhow::anyhow!("{error:#}\n(--device cpu works without a GPU)")),
        }
    }

    /// Threads of the processor.
    pub fn threads(&self) -> usize {
        match self {
            Chip::Cpu(device) => device.threads(),
            Chip::Cuda(device) => device.threads(),
        }
    }

    /// Bytes of workspace that operations have taken so far: at most what [`Device::workspace_bytes`] announces.
    pub fn workspace_taken(&self) -> usize {
        match self {
            Chip::Cpu(device) => device.workspace_taken(),
            Chip::Cuda(device) => device.workspace_taken(),
        }
    }
}

impl<T: Element> Buffer<T> for ChipBuf<T> {
    fn len(&self) -> usize {
        match self {
            ChipBuf::Cpu(buf) => buf.len(),
            ChipBuf::Cuda(buf) => buf.len(),
        }
    }

    fn host(&self) -> Option<&[T]> {
        match self {
            ChipBuf::Cpu(buf) => buf.host(),
            ChipBuf::Cuda(buf) => buf.host(),
        }
    }

    fn host_mut(&mut self) -> Option<&mut [T]> {
        match self {
            ChipBuf::Cpu(buf) => buf.host_mut(),
            ChipBuf::Cuda(buf) => buf.host_mut(),
        }
    }

    unsafe fn host_at_rest(&self) -> Option<&[T]> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                ChipBuf::Cpu(buf) => buf.host_at_rest(),
                ChipBuf::Cuda(buf) => buf.host_at_rest(),
            }
        }
    }

    unsafe fn host_at_rest_mut(&mut self) -> Option<&mut [T]> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                ChipBuf::Cpu(buf) => buf.host_at_rest_mut(),
                ChipBuf::Cuda(buf) => buf.host_at_rest_mut(),
            }
        }
    }

    fn read(&self, offset: usize, dst: &mut [T]) {
        match self {
            ChipBuf::Cpu(buf) => buf.read(offset, dst),
            ChipBuf::Cuda(buf) => buf.read(offset, dst),
        }
    }

    fn write(&mut self, offset: usize, src: &[T]) {
        match self {
            ChipBuf::Cpu(buf) => buf.write(offset, src),
            ChipBuf::Cuda(buf) => buf.write(offset, src),
        }
    }

    fn reserve(&mut self) {
        match self {
            ChipBuf::Cpu(buf) => buf.reserve(),
            ChipBuf::Cuda(buf) => buf.reserve(),
        }
    }

    fn located(&self) -> Option<Located> {
        match self {
            ChipBuf::Cpu(buf) => buf.located(),
            ChipBuf::Cuda(buf) => buf.located(),
        }
    }
}

const OTHER: &str = "memory of another device was given to this one";

/// How an argument of each kind is passed on to the processor or to a GPU.
macro_rules! side {
    ($side:ident, $variant:ident, $device:ident, $buf:ident, $packed:ident) => {
        struct $side;

        impl $side {
            fn value<T>(x: T) -> T {
                x
            }
            fn buf<T: Element>(x: &ChipBuf<T>) -> &$buf<T> {
                let ChipBuf::$variant(x) = x else { panic!("{OTHER}") };
                x
            }
            fn bufs<T: Element>(xs: Vec<&ChipBuf<T>>) -> Vec<&$buf<T>> {
                xs.into_iter().map(Self::buf).collect()
            }
            fn out<T: Element>(x: &mut ChipBuf<T>) -> &mut $buf<T> {
                let ChipBuf::$variant(x) = x else { panic!("{OTHER}") };
                x
            }
            fn maybe<T: Element>(x: Option<&ChipBuf<T>>) -> Option<&$buf<T>> {
                x.map(Self::buf)
            }
            fn maybe_out<T: Element>(x: Option<&mut ChipBuf<T>>) -> Option<&mut $buf<T>> {
                x.map(Self::out)
            }
            fn pair<'a, T: Element>(
                x: Option<(&'a ChipBuf<u32>, &'a ChipBuf<T>)>,
            ) -> Option<(&'a $buf<u32>, &'a $buf<T>)> {
                x.map(|(ids, table)| (Self::buf(ids), Self::buf(table)))
            }
            fn packed(x: &ChipPacked) -> &$packed {
                let ChipPacked::$variant(x) = x else { panic!("{OTHER}") };
                x
            }
            fn placed(x: Placed<'_, Chip>) -> Placed<'_, $device> {
                Placed { rows: x.rows, capacity: x.capacity, words: Self::buf(x.words) }
            }
            fn param<'a, E: Element>(x: Param<'a, Chip, E>) -> Param<'a, $device, E> {
                Param { w: Self::out(x.w), low: x.low.map(Self::out), rounding: x.rounding }
            }
        }
    };
}
side!(OnCpu, Cpu, CpuDevice, CpuBuf, Packed);
side!(OnCuda, Cuda, CudaDevice, CudaBuf, CudaPacked);

/// Writes each method of [`Device`] as a call of the chosen device's, from its signature and the kinds of its arguments.
/// `as` names what wraps a result that belongs to the device.
macro_rules! chip {
    ($(fn $name:ident $(<$($generic:ident),*>)? ($($arg:ident: $type:ty => $kind:ident),* $(,)?)
        -> $result:ty $(as $wrap:ident)?;)*) => {
        impl Device for Chip {
            type Buf<T: Element> = ChipBuf<T>;
            type Packed = ChipPacked;

            $(fn $name $(<$($generic: Element),*>)? (&self, $($arg: $type),*) -> $result {
                match self {
                    Chip::Cpu(device) => {
                        let result = device.$name $(::<$($generic),*>)? ($(OnCpu::$kind($arg)),*);
                        chip!(@ result Cpu $($wrap)?)
                    }
                    Chip::Cuda(device) => {
                        let result = device.$name $(::<$($generic),*>)? ($(OnCuda::$kind($arg)),*);
                        chip!(@ result Cuda $($wrap)?)
                    }
                }
            })*
        }
    };
    (@ $value:ident $variant:ident) => { $value };
    (@ $value:ident $variant:ident $wrap:ident) => { $value.map($wrap::$variant) };
}

chip! {
    fn describe() -> String;
    fn alloc<T>(len: usize => value) -> anyhow::Result<ChipBuf<T>> as ChipBuf;
    fn alloc_host<T>(len: usize => value) -> anyhow::Result<ChipBuf<T>> as ChipBuf;
    fn memory_taken() -> Option<u64>;
    fn upload<T>(dst: &mut ChipBuf<T> => out, offset: usize => value, src: &[T] => value) -> ();
    fn download<T>(src: &ChipBuf<T> => buf, offset: usize => value, dst: &mut [T] => value) -> ();
    fn wait() -> ();
    fn network() -> Option<anyhow::Result<Box<dyn Network>>>;
    fn repeated(work: &mut dyn FnMut() => value) -> ();
    fn beside(lane: Lane => value, work: &mut dyn FnMut() => value) -> Option<Box<dyn Transfer>>;
    fn fill<T>(dst: &mut ChipBuf<T> => out, value: T => value) -> ();
    fn embed<E, O>(rows: usize => value, width: usize => value, ids: &ChipBuf<u32> => buf, table: &ChipBuf<E> => buf,
        second: Option<(&ChipBuf<u32>, &ChipBuf<E>)> => pair, out: &mut ChipBuf<O> => out) -> ();
    fn embed_backward<G>(width: usize => value, ids: &ChipBuf<u32> => buf, dout: &ChipBuf<G> => buf,
        dtable: &mut ChipBuf<f32> => out) -> ();
    fn layer_norm<E>(rows: usize => value, width: usize => value, x: &ChipBuf<f32> => buf, gamma: &ChipBuf<f32> => buf,
        beta: &ChipBuf<f32> => buf, y: &mut ChipBuf<E> => out, y_f32: Option<&mut ChipBuf<f32>> => maybe_out,
        mean: &mut ChipBuf<f32> => out, rstd: &mut ChipBuf<f32> => out) -> ();
    fn layer_norm_backward<G>(width: usize => value, dy: &ChipBuf<G> => buf, x: &ChipBuf<f32> => buf,
        mean: &ChipBuf<f32> => buf, rstd: &ChipBuf<f32> => buf, gamma: &ChipBuf<f32> => buf,
        dx: &mut ChipBuf<f32> => out, dx_store: Store => value, dgamma: &mut ChipBuf<f32> => out,
        dbeta: &mut ChipBuf<f32> => out, grad_store: Store => value) -> ();
    fn linear<E, O>(s: LinearShape => value, x: &ChipBuf<E> => buf, w: &ChipBuf<E> => buf,
        bias: Option<&ChipBuf<f32>> => maybe, act: Activation => value, y: &mut ChipBuf<O> => out) -> ();
    fn linear_residual<E>(s: LinearShape => value, x: &ChipBuf<E> => buf, w: &ChipBuf<E> => buf,
        bias: Option<&ChipBuf<f32>> => maybe, dropout: Option<Dropout> => value, residual: &ChipBuf<f32> => buf,
        out: &mut ChipBuf<f32> => out) -> ();
    fn pack_weight(format: WeightFormat => value, n: usize => value, k: usize => value, rows: &ReadRows<'_> => value)
        -> anyhow::Result<ChipPacked> as ChipPacked;
    fn pack_codes(format: WeightFormat => value, n: usize => value, k: usize => value,
        rows: &mut dyn FnMut(std::ops::Range<usize>, quantise::Codes<'_>) -> anyhow::Result<()> => value)
        -> anyhow::Result<ChipPacked> as ChipPacked;
    fn pack_random(format: WeightFormat => value, n: usize => value, k: usize => value, random: RandomWeights => value)
        -> anyhow::Result<ChipPacked> as ChipPacked;
    fn packed_layout() -> String;
    fn packed_size(format: WeightFormat => value, n: usize => value, k: usize => value) -> usize;
    fn pack_weight_to(format: WeightFormat => value, n: usize => value, k: usize => value, rows: &ReadRows<'_> => value,
        write: &WritePiece<'_> => value) -> anyhow::Result<()>;
    fn packed_from(format: WeightFormat => value, n: usize => value, k: usize => value, bytes: Mapped => value)
        -> anyhow::Result<ChipPacked> as ChipPacked;
    fn packed_bytes(w: &ChipPacked => packed) -> usize;
    fn packed_linear<E, O>(m: usize => value, x: &ChipBuf<E> => buf, w: &ChipPacked => packed,
        bias: Option<&ChipBuf<f32>> => maybe, act: Activation => value, y: &mut ChipBuf<O> => out) -> ();
    fn packed_linear_residual<E>(m: usize => value, x: &ChipBuf<E> => buf, w: &ChipPacked => packed,
        bias: Option<&ChipBuf<f32>> => maybe, residual: &ChipBuf<f32> => buf, out: &mut ChipBuf<f32> => out) -> ();
    fn packed_embed(rows: usize => value, ids: &ChipBuf<u32> => buf, w: &ChipPacked => packed,
        second: Option<(&ChipBuf<u32>, &ChipBuf<f32>)> => pair, out: &mut ChipBuf<f32> => out) -> ();
    fn linear_backward_input<E, O>(s: LinearShape => value, dy: &ChipBuf<E> => buf, w: &ChipBuf<E> => buf,
        relu_output: Option<&ChipBuf<E>> => maybe, dx: &mut ChipBuf<O> => out) -> ();
    fn linear_backward_weight<E>(s: LinearShape => value, dy: &ChipBuf<E> => buf, x: &ChipBuf<E> => buf,
        dw: &mut ChipBuf<f32> => out, dbias: Option<&mut ChipBuf<f32>> => maybe_out, store: Store => value) -> ();
    fn residual<E>(rows: usize => value, width: usize => value, branch: &ChipBuf<E> => buf,
        bias: Option<&ChipBuf<f32>> => maybe, dropout: Option<Dropout> => value, residual: &ChipBuf<f32> => buf,
        out: &mut ChipBuf<f32> => out) -> ();
    fn residual_backward<E>(width: usize => value, dres: &ChipBuf<f32> => buf, dropout: Option<Dropout> => value,
        dy: &mut ChipBuf<E> => out) -> ();
    fn cast<S, T>(src: &ChipBuf<S> => buf, dst: &mut ChipBuf<T> => out) -> ();
    fn copy<T>(len: usize => value, src: &ChipBuf<T> => buf, from: usize => value, dst: &mut ChipBuf<T> => out,
        to: usize => value) -> ();
    fn accumulate(src: &ChipBuf<f32> => buf, from: usize => value, dst: &mut ChipBuf<f32> => out, store: Store => value)
        -> ();
    fn attention<E>(s: AttentionShape => value, qkv: &ChipBuf<E> => buf, doc_start: Option<&ChipBuf<u32>> => maybe,
        dropout: Option<Dropout> => value, out: &mut ChipBuf<E> => out, lse: &mut ChipBuf<f32> => out) -> ();
    fn attention_backward<E>(s: AttentionShape => value, qkv: &ChipBuf<E> => buf,
        doc_start: Option<&ChipBuf<u32>> => maybe, dropout: Option<Dropout> => value, out: &ChipBuf<E> => buf,
        lse: &ChipBuf<f32> => buf, dout: &ChipBuf<E> => buf, dqkv: &mut ChipBuf<E> => out) -> ();
    fn attention_paged<E>(heads: usize => value, width: usize => value, places: Placed<'_, Self> => placed,
        qkv: &ChipBuf<E> => buf, k_pages: &mut ChipBuf<E> => out, v_pages: &mut ChipBuf<E> => out,
        out: &mut ChipBuf<E> => out) -> ();
    fn copy_blocks<T>(size: usize => value, pairs: &[(u32, u32)] => value, x: &mut ChipBuf<T> => out) -> ();
    fn log_sum_exp(rows: usize => value, width: usize => value, x: &ChipBuf<f32> => buf, lse: &mut ChipBuf<f32> => out,
        largest: &mut ChipBuf<u32> => out) -> ();
    fn draw(width: usize => value, known: usize => value, logits: &ChipBuf<f32> => buf, draws: &[(usize, Draw)] => value)
        -> Vec<u32>;
    fn each_task(tasks: usize => value, task: &(dyn Fn(usize) + Sync) => value) -> ();
    fn lm_loss<E>(s: LossShape => value, h: &ChipBuf<E> => buf, w: &ChipBuf<E> => buf, targets: &ChipBuf<u32> => buf,
        combine: Option<&mut Combine<'_>> => value, losses: &mut ChipBuf<f32> => out) -> ();
    fn lm_loss_backward<E>(s: LossShape => value, h: &ChipBuf<E> => buf, w: &ChipBuf<E> => buf,
        targets: &ChipBuf<u32> => buf, combine: Option<&mut Combine<'_>> => value, scale: f32 => value,
        losses: &mut ChipBuf<f32> => out, dh: &mut ChipBuf<E> => out, dw: &mut ChipBuf<f32> => out, store: Store => value)
        -> ();
    fn sums_of_squares(xs: Vec<&ChipBuf<f32>> => bufs) -> Vec<f64>;
    fn adamw<E>(hyper: AdamW => value, param: Param<'_, Self, E> => param, grad: &ChipBuf<f32> => buf,
        m: &mut ChipBuf<f32> => out, v: &mut ChipBuf<f32> => out) -> ();
    fn sgd<E>(hyper: Sgd => value, param: Param<'_, Self, E> => param, grad: &ChipBuf<f32> => buf,
        momentum: Option<&mut ChipBuf<f32>> => maybe_out) -> ();
    fn set_master<E>(param: Param<'_, Self, E> => param, values: &[f32] => value) -> ();
    fn get_master<E>(w: &ChipBuf<E> => buf, low: Option<&ChipBuf<i16>> => maybe, values: &mut [f32] => value) -> ();
    fn workspace_bytes<E>(rows: usize => value, widest: usize => value, vocab: usize => value, width: usize => value,
        attention: AttentionShape => value) -> usize;
    fn measured_peak<E>() -> f64;
    fn measured_bandwidth() -> anyhow::Result<f64>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (name, which) in [("cpu", Which::Cpu), ("cuda", Which::Cuda(0)), ("cuda:3", Which::Cuda(3))] {
            assert_eq!(name.parse(), Ok(which));
            assert_eq!(which.to_string().parse(), Ok(which));
        }
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cpu:0"] {
            assert!(wrong.parse::<Which>().unwrap_err().contains("expected cpu"), "{wrong}");
        }
    }
}
