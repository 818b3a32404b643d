//! Kernels are compiled here, once.
//!
//! A generic function is compiled in every crate that calls it. Kernels are large, exist for several instruction sets,
//! and would be compiled again for every program and every test; so they are named here with their types filled in.

/// Runs `kernel::<E>(device, ...)`, or `kernel::<E, O>`, as this crate compiled it for the compute types that `E` and `O`
/// turn out to be. The arguments' types are written down, in terms of `E` and `O`.
macro_rules! once {
    ($device:ident, $($kernel:ident)::+ <$E:ident>, $($arg:ident: $t:ty),+) => {{
        let compiled = match $E::DTYPE {
            DType::F32 => once!(@compiled [$E = f32] $($kernel)::+ ($($arg: $t),+)),
            DType::Bf16 => once!(@compiled [$E = bf16] $($kernel)::+ ($($arg: $t),+)),
            DType::F16 => once!(@compiled [$E = f16] $($kernel)::+ ($($arg: $t),+)),
            other => panic!("{other} is no type to compute with; f32, bf16 and f16 are"),
        };
        once!(@call compiled $device ($($arg: $t),+))
    }};
    // Texts are never generated in f16.
    ($device:ident, $($kernel:ident)::+ <$E:ident of inference>, $($arg:ident: $t:ty),+) => {{
        let compiled = match $E::DTYPE {
            DType::F32 => once!(@compiled [$E = f32] $($kernel)::+ ($($arg: $t),+)),
            DType::Bf16 => once!(@compiled [$E = bf16] $($kernel)::+ ($($arg: $t),+)),
            other => panic!("{other} is no type to generate with; f32 and bf16 are"),
        };
        once!(@call compiled $device ($($arg: $t),+))
    }};
    ($device:ident, $($kernel:ident)::+ <$E:ident, $O:ident>, $($arg:ident: $t:ty),+) => {{
        let compiled = match ($E::DTYPE, $O::DTYPE) {
            (DType::F32, DType::F32) => once!(@compiled [$E = f32, $O = f32] $($kernel)::+ ($($arg: $t),+)),
            (DType::F32, DType::Bf16) => once!(@compiled [$E = f32, $O = bf16] $($kernel)::+ ($($arg: $t),+)),
            (DType::Bf16, DType::F32) => once!(@compiled [$E = bf16, $O = f32] $($kernel)::+ ($($arg: $t),+)),
            (DType::Bf16, DType::Bf16) => once!(@compiled [$E = bf16, $O = bf16] $($kernel)::+ ($($arg: $t),+)),
            (DType::F32, DType::F16) => once!(@compiled [$E = f32, $O = f16] $($kernel)::+ ($($arg: $t),+)),
            (DType::F16, DType::F32) => once!(@compiled [$E = f16, $O = f32] $($kernel)::+ ($($arg: $t),+)),
            (DType::F16, DType::F16) => once!(@compiled [$E = f16, $O = f16] $($kernel)::+ ($($arg: $t),+)),
            (a, b) => panic!("{a} to {b} are no types to compute with together; f32 with bf16 or f16 are"),
        };
        once!(@call compiled $device ($($arg: $t),+))
    }};
    // A function without type parameters: the names of the types that surround it stand for concrete ones in it.
    (@compiled [$($name:ident = $type:ty),+] $($kernel:ident)::+ ($($arg:ident: $t:ty),+)) => {{
        $(type $name = $type;)+
        fn compiled(device: &CpuDevice, $($arg: $t),+) {
            $($kernel)::+::<$($name),+>(device, $($arg),+)
        }
        compiled as *const ()
    }};
    (@call $compiled:ident $device:ident ($($arg:ident: $t:ty),+)) => {{
        // SAFETY: the pointer is to a function of this signature: it was chosen by the very types that appear in it.
        let kernel = unsafe { std::mem::transmute::<*const (), fn(&CpuDevice, $($t),+)>($compiled) };
        kernel($device, $($arg),+)
    }};
}
pub(super) use once;
