//! Instruction sets, and which of them suits the processor at hand.

use std::arch::x86_64::__cpuid;

use super::amx;

/// Instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, whatever the compiler makes of it.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL with VNNI; products of bf16 are widened to f32.
    Avx512,
    /// The same with BF16, whose `vdpbf16ps` multiplies bf16.
    Avx512Bf16,
    /// The same with tiles (AMX), which multiply bf16 and 8-bit integers; the rest as with [`Isa::Avx512`].
    Amx,
}

impl Isa {
    const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    /// The fastest that this processor has.
    pub fn detect() -> Self {
        // Intel's cores start a `vdpbf16ps` every other cycle and two fused multiply-adds every cycle, so that
        // widened products are twice as fast; AMD's start as many of one as of the other.
        match Self::highest() {
            Isa::Avx512Bf16 if vendor() == *b"GenuineIntel" => Isa::Avx512,
            isa => isa,
        }
    }

    /// The last of the list that this processor has.
    fn highest() -> Self {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("fma")
        {
            match is_x86_feature_detected!("avx512bf16") {
                true if amx::available() => Isa::Amx,
                true => Isa::Avx512Bf16,
                false => Isa::Avx512,
            }
        } else if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            Isa::Avx2
        } else {
            Isa::Portable
        }
    }

    /// All that this processor has.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|i| *i <= Isa::highest()).collect()
    }

    /// The instruction set of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|i| i.name() == name)
    }

    /// Name as in `FERROPT_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Amx => "amx",
        }
    }
}

/// The processor's maker, as it calls itself.
fn vendor() -> [u8; 12] {
    let id = __cpuid(0);
    let mut name = [0; 12];
    for (part, word) in name.chunks_exact_mut(4).zip([id.ebx, id.edx, id.ecx]) {
        part.copy_from_slice(&word.to_le_bytes());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_the_fastest_is_there() {
        for isa in Isa::ALL {
            assert_eq!(Isa::from_name(isa.name()), Some(isa));
        }
        assert_eq!(Isa::from_name("mmx"), None);
        assert!(Isa::available().contains(&Isa::detect()));
    }
}
