//! What a decoder says of a text, for the tests of several programs.

use ferropt_device::cpu::CpuDevice;
use ferropt_device::{Element, Segment};
use ferropt_model::{Cache, Decoder, Memory};

/// Logits of a text of one page at most, `[T, V]`, computed in `E`.
pub fn of<E: Element>(device: &CpuDevice, decoder: &Decoder<CpuDevice>, tokens: &[u32]) -> Vec<f32> {
    let mut cache = Cache::<_, E>::new(device, decoder.config(), 1).unwrap();
    let mut memory = Memory::new(device, decoder.config(), tokens.len(), tokens.len()).unwrap();
    let segments = [Segment { rows: tokens.len(), past: 0, pages: &[0] }];
    decoder.forward(device, tokens, &segments, &mut cache, &mut memory).unwrap();
    let rows: Vec<u32> = (0..tokens.len() as u32).collect();
    let logits = decoder.head(device, &rows, &mut memory).unwrap();
    let read = |row: usize| {
        let mut out = vec![];
        logits.read(row, &mut out);
        out
    };
    (0..tokens.len()).flat_map(read).collect()
}
