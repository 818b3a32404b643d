//! Memory of an operation, as the reactor sends and receives it: a buffer's own, or a copy where the processor does not reach that.
//! The device is waited for when it is made and when it is given back, by whoever calls the operation, and never by the reactor.

use crate::reactor::Memory;
use anyhow::{Result, anyhow};
use ferropt_device::{AtRest, Buffer, Element};
use std::any::Any;
use std::ops::Range;

impl<T: Element, B: Buffer<T> + 'static> Memory for AtRest<T, B> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self.elements())
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(self.elements_mut())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        Box::new(self.into_buffer())
    }
}

impl Memory for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// A buffer of memory that no processor reaches, with a copy of it that is sent and received instead.
pub(crate) struct Copied<T, B> {
    buffer: B,
    copy: Vec<T>,
    /// Elements that are copied back when all is done.
    back: Range<usize>,
}

/// Which elements an operation needs of such a buffer, and which it changes.
pub(crate) struct Touched {
    pub(crate) reads: Range<usize>,
    pub(crate) writes: Range<usize>,
}

impl Touched {
    /// Of a buffer of so many elements that is sent.
    pub(crate) fn sent(len: usize) -> Touched {
        Touched { reads: 0..len, writes: 0..0 }
    }

    /// Of a buffer of so many elements that is received.
    pub(crate) fn received(len: usize) -> Touched {
        Touched { reads: 0..0, writes: 0..len }
    }
}

impl<T: Element, B: Buffer<T>> Copied<T, B> {
    pub(crate) fn new(buffer: B, touched: Touched) -> Self {
        let mut copy = vec![T::default(); buffer.len()];
        buffer.read(touched.reads.start, &mut copy[touched.reads]);
        Copied { buffer, copy, back: touched.writes }
    }
}

impl<T: Element, B: Buffer<T> + 'static> Memory for Copied<T, B> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.copy)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.copy)
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        let Copied { mut buffer, copy, back } = *self;
        buffer.write(back.start, &copy[back]);
        Box::new(buffer)
    }
}

/// The buffer that went into an operation.
pub(crate) fn given_back<B: 'static>(memory: Box<dyn Memory>) -> Result<B> {
    let buffer =
        memory.into_any().downcast().map_err(|_| anyhow!("an operation gave another buffer back"))?;
    Ok(*buffer)
}
