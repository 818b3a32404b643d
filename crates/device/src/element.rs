//! Number types that buffers hold.

use half::{bf16, f16};

use crate::WeightFormat;

/// Type of a buffer's elements, as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// Unsigned 32-bit: token ids, positions.
    U32,
    /// Signed 16-bit: low halves of split masters.
    I16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 | DType::F16 | DType::I16 => 2,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::U32 => "u32",
            DType::I16 => "i16",
        })
    }
}

/// A number type that buffers hold. Compute types are `f32`, `bf16` and, for training, `f16`; the others
/// are only stored.
pub trait Element: bytemuck::Pod + Send + Sync + Default + PartialEq + std::fmt::Debug + 'static {
    /// The type, as a value.
    const DTYPE: DType;
    /// Value as f32.
    fn to_f32(self) -> f32;
    /// Nearest value (ties to even for bf16 and f16).
    fn from_f32(x: f32) -> Self;
}

macro_rules! element {
    ($t:ty, $d:ident, $to:expr, $from:expr) => {
        impl Element for $t {
            const DTYPE: DType = DType::$d;
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to(self)
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
        }
    };
}
element!(f32, F32, |x| x, |x| x);
element!(bf16, Bf16, bf16::to_f32, bf16::from_f32);
element!(f16, F16, f16::to_f32, f16::from_f32);
element!(u32, U32, |x| x as f32, |x| x as u32);
element!(i16, I16, |x| x as f32, |x| x as i16);

/// Refuses rows of a matrix of width `k`, from row `first` on, whose numbers a format would silently make others of: f16 has none
/// that large, and groups of codes none that are not finite.
pub(crate) fn check_rows(format: WeightFormat, first: usize, k: usize, rows: &[f32]) -> anyhow::Result<()> {
    match format {
        WeightFormat::F32 | WeightFormat::Bf16 => Ok(()),
        WeightFormat::F16 => check_f16(rows),
        WeightFormat::Int8 | WeightFormat::Int4 | WeightFormat::Int3 => {
            let wrong = rows.iter().position(|x| !x.is_finite());
            wrong.map_or(Ok(()), |at| {
                anyhow::bail!(
                    "the weight in row {}, column {} is {}, which {} cannot hold; the model is damaged",
                    first + at / k,
                    at % k,
                    rows[at],
                    format.name()
                )
            })
        }
    }
}

/// Refuses numbers that would become infinite as f16.
fn check_f16(numbers: &[f32]) -> anyhow::Result<()> {
    // From halfway to what would be the next number on.
    let beyond = numbers.iter().find(|x| x.is_finite() && x.abs() >= 65_520.0);
    beyond.map_or(Ok(()), |x| anyhow::bail!("a weight is {x}, but f16 ends at 65504; use bf16 or f32"))
}
