//! Host memory for kernels: zeroed, aligned to cache lines, and in huge pages where it is large, because a matrix
//! product walks many rows at once and would otherwise miss the TLB.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
use std::ptr::NonNull;

use super::simd::streams;
use crate::{Buffer, Element};

const LINE: usize = 64;
const PAGE: usize = 4 << 10;
/// Bytes from which memory comes straight from the system.
const LARGE: usize = 1 << 20;

/// A fixed number of elements; dereferences to a slice.
pub struct CpuBuf<T: Element> {
    data: NonNull<T>,
    len: usize,
}

// SAFETY: the buffer owns its memory and T is plain data.
unsafe impl<T: Element> Send for CpuBuf<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Element> Sync for CpuBuf<T> {}

impl<T: Element> CpuBuf<T> {
    /// Zeroed memory for `len` elements; an error names the size when there is not enough.
    pub fn zeroed(len: usize) -> anyhow::Result<Self> {
        if len == 0 {
            return Ok(CpuBuf { data: NonNull::dangling(), len });
        }
        let layout = layout::<T>(len)
            .ok_or_else(|| anyhow::anyhow!("cannot address a buffer of {len} elements of {}", T::DTYPE))?;
        let data = if layout.align() == PAGE {
            map(layout)
        } else {
            // SAFETY: the layout is not empty.
            NonNull::new(unsafe { alloc_zeroed(layout) })
        };
        // All-zero bytes are a valid T (Pod).
        let Some(data) = data.map(NonNull::cast) else {
            anyhow::bail!(
                "out of memory: {:.2} GiB asked for; use a smaller model or micro-batch, or recompute = \"full\"",
                layout.size() as f64 / (1u64 << 30) as f64
            );
        };
        Ok(CpuBuf { data, len })
    }
}

/// Size and alignment; large buffers are whole pages.
fn layout<T>(len: usize) -> Option<Layout> {
    let bytes = len.checked_mul(size_of::<T>())?;
    if bytes < LARGE {
        return Layout::from_size_align(bytes, LINE).ok();
    }
    Layout::from_size_align(bytes.checked_next_multiple_of(PAGE)?, PAGE).ok()
}

/// Memory straight from the system, in huge pages if it has them. It is zero, and takes none until it is written, which a
/// cache for many texts or long ones may never be. The system puts one mapping beside the other, and a huge page may belong to
/// two of them: matrices of a few MiB that began with one each would take an eighth more memory.
fn map(layout: Layout) -> Option<NonNull<u8>> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory, of which nothing else knows.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), layout.size(), protection, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return None;
        }
        // Advice; a refusal changes nothing.
        #[cfg(target_os = "linux")]
        libc::madvise(start, layout.size(), libc::MADV_HUGEPAGE);
        NonNull::new(start.cast())
    }
}

impl<T: Element> Drop for CpuBuf<T> {
    fn drop(&mut self) {
        if let (Some(layout), true) = (layout::<T>(self.len), self.len > 0) {
            // SAFETY: allocated by `zeroed` with the same layout, in the same way.
            unsafe {
                if layout.align() == PAGE {
                    libc::munmap(self.data.as_ptr().cast(), layout.size());
                } else {
                    dealloc(self.data.as_ptr().cast(), layout);
                }
            }
        }
    }
}

impl<T: Element> std::ops::Deref for CpuBuf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements that we own.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Element> std::ops::DerefMut for CpuBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Element> Buffer<T> for CpuBuf<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn host(&self) -> Option<&[T]> {
        Some(self)
    }

    fn host_mut(&mut self) -> Option<&mut [T]> {
        Some(self)
    }

    fn read(&self, offset: usize, dst: &mut [T]) {
        dst.copy_from_slice(&self[offset..offset + dst.len()]);
    }

    fn write(&mut self, offset: usize, src: &[T]) {
        self[offset..offset + src.len()].copy_from_slice(src);
    }

    fn reserve(&mut self) {
        for page in self.chunks_mut(PAGE / size_of::<T>()) {
            page[0] = T::default();
        }
    }
}

/// A mutable slice that threads write disjoint parts of.
#[derive(Clone, Copy)]
pub struct Shards<'a, T> {
    data: *mut T,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `range` and `read`, whose callers promise disjointness.
unsafe impl<T: Send + Sync> Send for Shards<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Shards<'_, T> {}

impl<'a, T> Shards<'a, T> {
    /// Shares `slice` among threads.
    pub fn new(slice: &'a mut [T]) -> Self {
        Shards { data: slice.as_mut_ptr(), len: slice.len(), lifetime: std::marker::PhantomData }
    }

    /// Elements in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Asks for the cache lines of a part that is about to be written.
    #[inline(always)]
    pub fn prefetch(&self, start: usize, len: usize) {
        for at in (0..len).step_by(LINE / size_of::<T>()) {
            let line = self.data.wrapping_add(start + at);
            // SAFETY: the hint touches nothing; a processor that lacks it does nothing.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.cast_const().cast()) }
        }
    }

    /// [`Shards::prefetch`] for [`Simd::write_row`](super::simd::Simd::write_row).
    #[inline(always)]
    pub fn prefetch_row(&self, start: usize, len: usize)
    where
        T: Element,
    {
        if !streams(self.pointer(start), len) {
            self.prefetch(start, len);
        }
    }

    /// Where an element is, or would be.
    #[inline(always)]
    pub fn pointer(&self, at: usize) -> *const T {
        self.data.wrapping_add(at)
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn range(&self, range: std::ops::Range<usize>) -> &'a mut [T] {
        self.check(&range);
        // SAFETY: within bounds; disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }

    /// A part of the slice that nobody writes to.
    ///
    /// # Safety
    /// No part that [`Shards::range`] gave and that is alive at the same time overlaps with it.
    #[inline(always)]
    pub unsafe fn read(&self, range: std::ops::Range<usize>) -> &'a [T] {
        self.check(&range);
        // SAFETY: within bounds; that it does not change is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), range.len()) }
    }

    #[inline(always)]
    fn check(&self, range: &std::ops::Range<usize>) {
        let len = self.len;
        assert!(range.start <= range.end && range.end <= len, "range {range:?} of {len} elements");
    }
}
