//! Intel's Advanced Matrix Extensions: eight tile registers of 16 rows of 64 bytes, and instructions that multiply them,
//! sixteen times as many numbers a cycle as vectors do. The compiler knows neither, so a whole inner loop is one piece of
//! assembly that begins and ends in memory.
//!
//! A tile of A holds 16 rows of 32 numbers of bf16; one of B 16 units (pairs of neighbours in k) of 16 columns; one of sums
//! 16 x 16 f32. A product of two adds, for each sum, first the lower numbers of the pairs in order and the upper ones
//! likewise, then both to what was there. Denormal numbers count as zero, and sums are rounded to nearest even.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Rows, and columns, of sums that [`Tiles::multiply`] makes: two tiles each way.
pub(super) const SIDE: usize = 2 * ROWS;
/// Units of k that one product of tiles takes.
pub(super) const STEP: usize = 16;
/// Words of a cache line.
const LINE: usize = 16;
/// Words of a tile.
const TILE: usize = 16 * STEP;

/// Whether the processor has tiles for bf16 and 8-bit integers, and the system lets this process use them.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let features = __cpuid_count(7, 0).edx;
        [22, 24, 25].into_iter().all(|bit| features >> bit & 1 != 0) && permitted()
    })
}

/// Asks the system for the tile registers, which double a thread's state and are therefore granted on request only.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        /// `ARCH_REQ_XCOMP_PERM` and `XFEATURE_XTILEDATA` of Linux's asm/prctl.h.
        const REQUEST: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: the call changes nothing but what this process may do; kernels that do not know it refuse.
        unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The tile registers of this thread until it is dropped. They belong to the thread that made it.
pub(super) struct Tiles {
    /// Units in the registers for the rest of k.
    rest: usize,
    of_thread: PhantomData<*const ()>,
}

/// What `ldtilecfg` reads: palette 1, then bytes of a row and rows of each register.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// # Safety
    /// [`available`] is true.
    pub(super) unsafe fn new() -> Self {
        // SAFETY: as the caller promises.
        unsafe { Self::shaped(ROWS, STEP) }
    }

    /// With so many rows in registers 0, of sums, and 4 and 6, of A, and so many units in the last of these and in 7, of B.
    ///
    /// # Safety
    /// [`available`] is true, and there are 1 to 16 rows and units.
    unsafe fn shaped(rows: usize, units: usize) -> Self {
        let mut shapes =
            Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shapes.row_bytes[..8].fill(64);
        shapes.rows[..8].fill(16);
        for register in [0, 4, 6] {
            shapes.rows[register] = rows as u8;
        }
        shapes.row_bytes[6] = 4 * units as u16;
        shapes.rows[7] = units as u8;
        // SAFETY: the processor has tiles, and `shapes` is laid out as it wants.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
        Tiles { rest: units, of_thread: PhantomData }
    }

    /// For [`Tiles::multiply_square`] of so many rows, at most 16, and where it ends with a step of so many units, if any.
    ///
    /// # Safety
    /// [`available`] is true.
    pub(super) unsafe fn square(rows: usize, units: usize) -> Self {
        // SAFETY: as the caller promises.
        unsafe { Self::shaped(rows, if units == 0 { STEP } else { units }) }
    }

    /// For products of at most 16 rows.
    pub(super) fn upper(&self) -> Upper<'_> {
        Upper(PhantomData)
    }

    /// `out[SIDE][SIDE] = a * b`, or with `add` `out += a * b`, of panels of whole steps: `a` `[step][2 tiles]`, `b`
    /// `[unit][SIDE]`. Meanwhile `next` is brought to the second-level cache. `b` is what stays in the first level: `a` is read
    /// past it.
    #[inline(always)]
    pub(super) fn multiply(&self, a: &[u32], b: &[u32], add: bool, out: &mut [f32], next: &[u32]) {
        let out = &mut out[..SIDE * SIDE];
        let steps = b.len() / (2 * TILE);
        assert!(a.len() == 2 * TILE * steps && b.len() == a.len(), "panels are not of whole steps");
        if steps == 0 {
            if !add {
                out.fill(0.0);
            }
            return;
        }
        // SAFETY: the registers are set up as long as `self` lives; `a` and `b` have what is read, `out` what is written.
        unsafe {
            asm!(
                "test {add:e}, {add:e}",
                "jz 2f",
                "tileloadd tmm0, [{out} + {double}]",
                "tileloadd tmm1, [{out} + {double} + 64]",
                "tileloadd tmm2, [{out} + {double} + 2048]",
                "tileloadd tmm3, [{out} + {double} + 2112]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "tileloaddt1 tmm4, [{a} + {single}]",
                "tileloadd tmm6, [{b} + {double}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {double} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloaddt1 tmm5, [{a} + {single} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "mov {left}, {lines}",
                "4:",
                "prefetcht1 [{next}]",
                "add {next}, 64",
                "dec {left}",
                "jnz 4b",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{out} + {double}], tmm0",
                "tilestored [{out} + {double} + 64], tmm1",
                "tilestored [{out} + {double} + 2048], tmm2",
                "tilestored [{out} + {double} + 2112], tmm3",
                add = in(reg) u32::from(add),
                out = in(reg) out.as_mut_ptr(),
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                next = inout(reg) next.as_ptr() => _,
                lines = in(reg) next.len().div_ceil(steps * LINE).max(1),
                left = out(reg) _,
                steps = inout(reg) steps => _,
                single = in(reg) 64usize,
                double = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// An operand whose rows begin `row` words apart.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    pub(super) data: &'a [u32],
    pub(super) row: usize,
}

impl Tiles {
    /// `out[16][16] = a * b`, or with `add` `out += a * b`, over `units` of k of operands that lie anywhere: rows of units `a`, rows
    /// of columns `b`, one for each unit. Rows of `out` are `row` apart. If `units` are not whole steps, `self` was made for the rest.
    #[inline(always)]
    pub(super) fn multiply_square(
        &self,
        units: usize,
        a: Strided,
        b: Strided,
        add: bool,
        out: &mut [f32],
        row: usize,
    ) {
        let (steps, rest) = (units / STEP, units % STEP);
        assert!(rest == 0 || rest == self.rest, "the registers are set up for another rest of k");
        assert!(units > 0 && 15 * a.row + units <= a.data.len(), "the left operand ends early");
        assert!((units - 1) * b.row + 16 <= b.data.len(), "the right operand ends early");
        assert!(15 * row + 16 <= out.len(), "there is no room for the sums");
        // SAFETY: the registers are set up as long as `self` lives; all that is read and written is there, as asserted.
        unsafe {
            asm!(
                "test {add:e}, {add:e}",
                "jz 2f",
                "tileloadd tmm0, [{out} + {row}]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "3:",
                "test {steps}, {steps}",
                "jz 5f",
                "4:",
                "tileloadd tmm4, [{a} + {a_row}]",
                "tileloadd tmm5, [{b} + {b_row}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "add {a}, 64",
                "add {b}, {b_step}",
                "dec {steps}",
                "jnz 4b",
                "5:",
                "test {rest:e}, {rest:e}",
                "jz 6f",
                "tileloadd tmm6, [{a} + {a_row}]",
                "tileloadd tmm7, [{b} + {b_row}]",
                "tdpbf16ps tmm0, tmm6, tmm7",
                "6:",
                "tilestored [{out} + {row}], tmm0",
                add = in(reg) u32::from(add),
                out = in(reg) out.as_mut_ptr(),
                row = in(reg) 4 * row,
                a = inout(reg) a.data.as_ptr() => _,
                a_row = in(reg) 4 * a.row,
                b = inout(reg) b.data.as_ptr() => _,
                b_row = in(reg) 4 * b.row,
                b_step = in(reg) 4 * STEP * b.row,
                steps = inout(reg) steps => _,
                rest = in(reg) rest as u32,
                out("tmm0") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// Columns of [`Tiles::multiply_bytes`]: three tiles.
pub(super) const BYTE_COLUMNS: usize = 48;

impl Tiles {
    /// `out[16][BYTE_COLUMNS] = a * b`, exactly: signed bytes `a`, 16 rows of 64, by unsigned ones `b`, `[16][BYTE_COLUMNS]` words
    /// of four neighbours in k.
    #[inline(always)]
    pub(super) fn multiply_bytes(&self, a: &[u32], b: &[u32], out: &mut [i32; 16 * BYTE_COLUMNS]) {
        let (a, b) = (&a[..TILE], &b[..16 * BYTE_COLUMNS]);
        // SAFETY: the registers are set up as long as `self` lives; all three have what is read and written.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tileloadd tmm4, [{a} + {row}]",
                "tileloadd tmm5, [{b} + {columns}]",
                "tdpbsud tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{b} + {columns} + 64]",
                "tdpbsud tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {columns} + 128]",
                "tdpbsud tmm2, tmm4, tmm7",
                "tilestored [{out} + {columns}], tmm0",
                "tilestored [{out} + {columns} + 64], tmm1",
                "tilestored [{out} + {columns} + 128], tmm2",
                a = in(reg) a.as_ptr(),
                b = in(reg) b.as_ptr(),
                out = in(reg) out.as_mut_ptr(),
                row = in(reg) 64usize,
                columns = in(reg) 4 * BYTE_COLUMNS,
                out("tmm0") _, out("tmm1") _, out("tmm2") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// The tile registers for products of at most 16 rows: [`Tiles::multiply`] with one tile of them.
pub(super) struct Upper<'a>(PhantomData<&'a Tiles>);

impl Upper<'_> {
    /// [`Tiles::multiply`] of `a` `[step][tile]`, for the first 16 rows of `out`.
    #[inline(always)]
    pub(super) fn multiply(&self, a: &[u32], b: &[u32], add: bool, out: &mut [f32], next: &[u32]) {
        let out = &mut out[..SIDE * SIDE / 2];
        let steps = b.len() / (2 * TILE);
        assert!(a.len() == TILE * steps && b.len() == 2 * a.len(), "panels are not of whole steps");
        if steps == 0 {
            if !add {
                out.fill(0.0);
            }
            return;
        }
        // SAFETY: as in `Tiles::multiply`.
        unsafe {
            asm!(
                "test {add:e}, {add:e}",
                "jz 2f",
                "tileloadd tmm0, [{out} + {double}]",
                "tileloadd tmm1, [{out} + {double} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "3:",
                "tileloaddt1 tmm4, [{a} + {single}]",
                "tileloadd tmm6, [{b} + {double}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {double} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 1024",
                "add {b}, 2048",
                "mov {left}, {lines}",
                "4:",
                "prefetcht1 [{next}]",
                "add {next}, 64",
                "dec {left}",
                "jnz 4b",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{out} + {double}], tmm0",
                "tilestored [{out} + {double} + 64], tmm1",
                add = in(reg) u32::from(add),
                out = in(reg) out.as_mut_ptr(),
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                next = inout(reg) next.as_ptr() => _,
                lines = in(reg) next.len().div_ceil(steps * LINE).max(1),
                left = out(reg) _,
                steps = inout(reg) steps => _,
                single = in(reg) 64usize,
                double = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// Products of tiles that [`Tiles::all_at_once`] does in a round.
pub(super) const ROUND: usize = 4;

impl Tiles {
    /// Multiplies what the registers hold, `rounds` times four products that do not wait for each other: the most that the
    /// processor can do.
    pub(super) fn all_at_once(&self, rounds: usize) {
        // SAFETY: the registers are set up as long as `self` lives.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) rounds.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: made only where the processor has tiles. Releasing them frees the system from saving 8 KiB a switch.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
