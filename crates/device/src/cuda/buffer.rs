//! Memory of a GPU.

use std::marker::PhantomData;
use std::sync::Arc;

use anyhow::{Context as _, Result};

use super::driver::{Address, Gpu};
use crate::{Buffer, Element};

/// A fixed number of elements in a GPU's memory.
pub struct CudaBuf<T: Element> {
    gpu: Arc<Gpu>,
    address: Address,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> CudaBuf<T> {
    /// Memory with unspecified contents.
    pub(super) fn new(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .with_context(|| format!("cannot address a buffer of {len} elements of {}", T::DTYPE))?;
        let address = if bytes == 0 { 0 } else { gpu.allocate(bytes)? };
        Ok(CudaBuf { gpu: gpu.clone(), address, len, element: PhantomData })
    }

    /// Memory of zeros.
    pub(super) fn zeroed(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        let buffer = Self::new(gpu, len)?;
        buffer.clear(0, len);
        Ok(buffer)
    }

    /// Address of element `offset`, from which on `len` elements are used.
    ///
    /// # Panics
    /// When they are not all in the buffer: what is out of bounds here would be memory of something else there.
    pub(super) fn at(&self, offset: usize, len: usize) -> Address {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "elements {offset} to {} of a buffer of {}",
            offset + len,
            self.len
        );
        self.address + (offset * size_of::<T>()) as u64
    }

    /// Zeros a part.
    pub(super) fn clear(&self, offset: usize, len: usize) {
        // SAFETY: within the buffer.
        unsafe { self.gpu.clear(self.at(offset, len), len * size_of::<T>()) };
    }

    /// Copies `src` to the elements from `offset` on.
    pub(super) fn upload(&self, offset: usize, src: &[T]) {
        // SAFETY: within the buffer.
        unsafe { self.gpu.upload(self.at(offset, src.len()), src) };
    }

    /// Copies the elements from `offset` on to `dst`, when all work before is done.
    pub(super) fn download(&self, offset: usize, dst: &mut [T]) {
        // SAFETY: within the buffer.
        unsafe { self.gpu.download(self.at(offset, dst.len()), dst) };
    }

    /// Copies `len` elements of `src`, which may be this very buffer, in which case the parts must not overlap.
    pub(super) fn copy_from(&self, to: usize, src: &CudaBuf<T>, from: usize, len: usize) {
        // SAFETY: both sides are within their bounds.
        unsafe { self.gpu.copy(self.at(to, len), src.at(from, len), len * size_of::<T>()) };
    }
}

impl<T: Element> Drop for CudaBuf<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            self.gpu.free(self.address);
        }
    }
}

impl<T: Element> Buffer<T> for CudaBuf<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn host(&self) -> Option<&[T]> {
        None
    }

    fn host_mut(&mut self) -> Option<&mut [T]> {
        None
    }
}
