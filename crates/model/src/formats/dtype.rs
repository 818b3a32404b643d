//! Element types of weights in files.

use anyhow::{Result, bail, ensure};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

/// Type of a stored tensor's elements. Files hold them little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
}

/// Elements that are converted at a time: their bytes are copied into an aligned buffer first.
const BATCH: usize = 4096;

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    /// Short name: `f32`, `f16` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::BF16 => "bf16",
        }
    }

    /// PyTorch's name.
    pub(super) fn torch_name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
        }
    }

    /// Elements as f32, which is exact. `bytes` holds `out.len()` elements, and need not be aligned.
    pub(super) fn to_f32(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.size());
        if self == Dtype::F32 {
            for (to, from) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *to = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
            }
            return;
        }
        let mut bits = [0u16; BATCH];
        for (to, from) in out.chunks_mut(BATCH).zip(bytes.chunks(2 * BATCH)) {
            let bits = &mut bits[..to.len()];
            for (b, from) in bits.iter_mut().zip(from.chunks_exact(2)) {
                *b = u16::from_le_bytes([from[0], from[1]]);
            }
            match self {
                Dtype::F16 => bits.reinterpret_cast::<f16>().convert_to_f32_slice(to),
                _ => bits.reinterpret_cast::<bf16>().convert_to_f32_slice(to),
            }
        }
    }

    /// Appends the values, rounded to nearest, ties to even.
    ///
    /// # Errors
    /// When a finite value lies beyond what the type can hold.
    pub(super) fn append(self, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
        match self {
            Dtype::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Dtype::F16 => {
                for v in values {
                    let half = f16::from_f32(*v);
                    ensure!(
                        !(v.is_finite() && half.is_infinite()),
                        "the value {v} does not fit f16, which ends at 65504; convert to bf16 or f32"
                    );
                    out.extend(half.to_le_bytes());
                }
            }
            Dtype::BF16 => {
                for v in values {
                    let half = bf16::from_f32(*v);
                    ensure!(
                        !(v.is_finite() && half.is_infinite()),
                        "the value {v} does not fit bf16, which ends at 3.39e38; convert to f32"
                    );
                    out.extend(half.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    /// What safetensors calls it.
    pub(super) fn safetensors(self) -> safetensors::Dtype {
        match self {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::BF16 => safetensors::Dtype::BF16,
        }
    }
}

impl TryFrom<safetensors::Dtype> for Dtype {
    type Error = anyhow::Error;

    fn try_from(dtype: safetensors::Dtype) -> Result<Dtype> {
        Ok(match dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::BF16,
            other => bail!("has elements of type {other}; weights are F32, F16 or BF16"),
        })
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_comes_back_to_the_bit() {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let mut values = vec![0f32; all.len() / 2];
            dtype.to_f32(&all, &mut values);
            let mut back = Vec::new();
            dtype.append(&values, &mut back).unwrap();
            for (i, (a, b)) in all.chunks(2).zip(back.chunks(2)).enumerate() {
                assert!(a == b || values[i].is_nan(), "{dtype} {i:#x}");
            }
        }
    }

    #[test]
    fn values_that_would_become_infinite_are_refused() {
        let mut out = Vec::new();
        let message = Dtype::F16.append(&[1.0, 70_000.0], &mut out).unwrap_err().to_string();
        assert!(message.contains("70000") && message.contains("bf16"), "{message}");
        assert!(Dtype::BF16.append(&[f32::MAX], &mut out).is_err());
        Dtype::F16.append(&[f32::INFINITY, 65504.0], &mut out).unwrap();
    }
}
