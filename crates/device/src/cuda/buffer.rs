//! Memory of a GPU, and of its host where the GPU reaches it.

use std::marker::PhantomData;
use std::sync::Arc;

use anyhow::{Context as _, Result};

use super::driver::{Address, Gpu};
use crate::{Buffer, Element, Located};

/// A fixed number of elements in a GPU's memory, or in its host's: pinned, so that kernels and copies reach it over the bus
/// at the same address.
pub struct CudaBuf<T: Element> {
    gpu: Arc<Gpu>,
    address: Address,
    len: usize,
    on_host: bool,
    element: PhantomData<T>,
}

impl<T: Element> CudaBuf<T> {
    /// Memory with unspecified contents.
    pub(super) fn new(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        Self::made(gpu, len, false)
    }

    fn made(gpu: &Arc<Gpu>, len: usize, on_host: bool) -> Result<Self> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .with_context(|| format!("cannot address a buffer of {len} elements of {}", T::DTYPE))?;
        let address = match (bytes, on_host) {
            (0, _) => 0,
            (_, false) => gpu.allocate(bytes)?,
            (_, true) => gpu.allocate_on_host(bytes)?,
        };
        Ok(CudaBuf { gpu: gpu.clone(), address, len, on_host, element: PhantomData })
    }

    /// Memory of zeros.
    pub(super) fn zeroed(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        let buffer = Self::new(gpu, len)?;
        buffer.clear(0, len);
        Ok(buffer)
    }

    /// The host's memory, of zeros.
    pub(super) fn zeroed_on_host(gpu: &Arc<Gpu>, len: usize) -> Result<Self> {
        let mut buffer = Self::made(gpu, len, true)?;
        buffer.host_mut().unwrap_or_default().fill(T::default());
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

    /// Copies `len` elements of `src`, which may be this very buffer, in which case the parts must not overlap.
    pub(super) fn copy_from(&self, to: usize, src: &CudaBuf<T>, from: usize, len: usize) {
        // SAFETY: both sides are within their bounds.
        unsafe { self.gpu.copy(self.at(to, len), src.at(from, len), len * size_of::<T>()) };
    }
}

impl<T: Element> Drop for CudaBuf<T> {
    fn drop(&mut self) {
        match (self.len, self.on_host) {
            (0, _) => {}
            (_, false) => self.gpu.free(self.address, self.len * size_of::<T>()),
            (_, true) => self.gpu.free_on_host(self.address),
        }
    }
}

impl<T: Element> Buffer<T> for CudaBuf<T> {
    fn len(&self) -> usize {
        self.len
    }

    /// Of the host's memory, when all work before is done.
    fn host(&self) -> Option<&[T]> {
        if self.on_host && self.len > 0 {
            self.gpu.wait();
        }
        // SAFETY: all work is over. What writes to the memory takes the buffer exclusively, so there is none as long as the
        // slice is borrowed.
        unsafe { self.host_at_rest() }
    }

    fn host_mut(&mut self) -> Option<&mut [T]> {
        if self.on_host && self.len > 0 {
            self.gpu.wait();
        }
        // SAFETY: all work is over, and the buffer is borrowed exclusively.
        unsafe { self.host_at_rest_mut() }
    }

    unsafe fn host_at_rest(&self) -> Option<&[T]> {
        match (self.on_host, self.len) {
            (false, _) => None,
            (true, 0) => Some(&[]),
            // SAFETY: memory of the host that is ours and was zeroed; the caller promises that no work writes to it.
            (true, len) => Some(unsafe { std::slice::from_raw_parts(self.address as *const T, len) }),
        }
    }

    unsafe fn host_at_rest_mut(&mut self) -> Option<&mut [T]> {
        match (self.on_host, self.len) {
            (false, _) => None,
            (true, 0) => Some(&mut []),
            // SAFETY: memory of the host that is ours, in which all bytes are a T (Pod); the caller promises that no work uses it.
            (true, len) => Some(unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, len) }),
        }
    }

    fn read(&self, offset: usize, dst: &mut [T]) {
        if let Some(host) = self.host() {
            return dst.copy_from_slice(&host[offset..][..dst.len()]);
        }
        // SAFETY: within the buffer.
        unsafe { self.gpu.download(self.at(offset, dst.len()), dst) };
    }

    fn write(&mut self, offset: usize, src: &[T]) {
        if let Some(host) = self.host_mut() {
            return host[offset..][..src.len()].copy_from_slice(src);
        }
        // SAFETY: within the buffer.
        unsafe { self.gpu.upload(self.at(offset, src.len()), src) };
    }

    fn located(&self) -> Option<Located> {
        let device = Arc::as_ptr(&self.gpu) as usize;
        (!self.on_host).then_some(Located { device, address: self.address, len: self.len, dtype: T::DTYPE })
    }
}
