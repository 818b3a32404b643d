//! Writes pickles of protocol 2: the dictionaries, numbers and tensors of a checkpoint, and nothing that a careful
//! reader (`torch.load(weights_only=True)`) would refuse.

use super::super::dtype::Dtype;

/// A value to be written.
pub(in super::super) enum Item {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Dict(Vec<(String, Item)>),
    /// A tensor in `data/STORAGE` of the archive.
    Tensor {
        dtype: Dtype,
        shape: Vec<usize>,
        storage: usize,
    },
}

/// The pickle of a value.
pub(in super::super) fn pickle(item: &Item) -> Vec<u8> {
    let mut out = vec![0x80, 2];
    put(item, &mut out);
    out.push(b'.');
    out
}

fn put(item: &Item, out: &mut Vec<u8>) {
    match item {
        Item::Bool(b) => out.push(if *b { 0x88 } else { 0x89 }),
        Item::Int(n) => int(*n, out),
        Item::Float(x) => {
            out.push(b'G');
            out.extend(x.to_be_bytes());
        }
        Item::Text(s) => text(s, out),
        Item::Dict(items) => {
            out.extend(b"}(");
            for (key, value) in items {
                text(key, out);
                put(value, out);
            }
            out.push(b'u');
        }
        Item::Tensor { dtype, shape, storage } => tensor(*dtype, shape, *storage, out),
    }
}

fn int(n: i64, out: &mut Vec<u8>) {
    match n {
        0..=0xff => out.extend([b'K', n as u8]),
        -0x8000_0000..=0x7fff_ffff => {
            out.push(b'J');
            out.extend((n as i32).to_le_bytes());
        }
        _ => {
            out.extend([0x8a, 8]);
            out.extend(n.to_le_bytes());
        }
    }
}

fn text(s: &str, out: &mut Vec<u8>) {
    out.push(b'X');
    out.extend((s.len() as u32).to_le_bytes());
    out.extend(s.as_bytes());
}

fn tuple(sizes: &[usize], out: &mut Vec<u8>) {
    out.push(b'(');
    sizes.iter().for_each(|n| int(*n as i64, out));
    out.push(b't');
}

/// `torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`.
fn tensor(dtype: Dtype, shape: &[usize], storage: usize, out: &mut Vec<u8>) {
    let class = match dtype {
        Dtype::F32 => "FloatStorage",
        Dtype::F16 => "HalfStorage",
        Dtype::BF16 => "BFloat16Storage",
    };
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text("storage", out);
    out.extend(format!("ctorch\n{class}\n").as_bytes());
    text(&storage.to_string(), out);
    text("cpu", out);
    int(shape.iter().product::<usize>() as i64, out);
    out.extend(b"tQ");
    int(0, out);
    tuple(shape, out);
    let strides: Vec<usize> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
    tuple(&strides, out);
    out.extend([0x89]);
    out.extend(b"ccollections\nOrderedDict\n)RtR");
}
