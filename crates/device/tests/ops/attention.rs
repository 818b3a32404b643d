use ferropt_device::{AttentionShape, Device, Dropout, Element, PAGE, Places, Segment, bf16, f16};

use crate::*;

/// What position t attends to, and what dropout does there.
#[derive(Clone)]
struct Case {
    s: AttentionShape,
    doc_start: Option<Vec<u32>>,
    dropout: Option<Dropout>,
}

impl Case {
    fn first_key(&self, b: usize, t: usize) -> usize {
        self.doc_start.as_ref().map_or(0, |d| d[b * self.s.seq + t] as usize)
    }

    /// Factor of a probability, by the definition of the mask.
    fn mask(&self, b: usize, h: usize, t: usize, key: usize) -> f64 {
        let Some(d) = self.dropout else { return 1.0 };
        let row =
            (d.first_row + (b * self.s.seq + t) as u64) * self.s.among.1 as u64 + (self.s.among.0 + h) as u64;
        let kept = d.stream.word(row, key) as f64 >= d.p as f64 * 4_294_967_296.0;
        if kept { 1.0 / (1.0 - d.p as f64) } else { 0.0 }
    }

    fn tokens(&self) -> usize {
        self.s.batch * self.s.seq
    }

    fn all(&self) -> usize {
        self.s.heads * self.s.width
    }
}

/// The definition in f64, with what the rounding of each step may change.
struct Reference {
    out: Vec<f64>,
    lse: Vec<f64>,
    dqkv: Vec<f64>,
    out_slack: Vec<f64>,
    lse_slack: Vec<f64>,
    dqkv_slack: Vec<f64>,
}

/// Probabilities below about 10^-38 may become 0.
const TINY: f64 = 1e-30;

/// `unit` is the relative error of rounding probabilities and outputs; 0 for f32.
fn reference(case: &Case, qkv: &[f64], dout: &[f64], unit: f64) -> Reference {
    let AttentionShape { batch, seq, heads, width, .. } = case.s;
    let all = case.all();
    let zeros = |len| vec![0.0; len];
    let mut r = Reference {
        out: zeros(case.tokens() * all),
        lse: zeros(batch * heads * seq),
        dqkv: zeros(case.tokens() * 3 * all),
        out_slack: zeros(case.tokens() * all),
        lse_slack: zeros(batch * heads * seq),
        dqkv_slack: zeros(case.tokens() * 3 * all),
    };
    let scale = 1.0 / (width as f64).sqrt();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let size = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>();
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        let at = |which: usize, t: usize| ((b * seq + t) * 3 + which) * all + h * width;
        let part = |which: usize, t: usize| &qkv[at(which, t)..][..width];
        for t in 0..seq {
            let keys = case.first_key(b, t)..t + 1;
            let q = part(0, t);
            let scores: Vec<f64> = keys.clone().map(|k| scale * dot(q, part(1, k))).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
            // A score's error: of its sum, and of what is subtracted from it. exp makes it relative.
            let off = keys.clone().map(|k| scale * size(q, part(1, k))).fold(0.0, f64::max);
            let off = 16.0 * UNIT * (1.0 + off + lse.abs());
            r.lse[(b * heads + h) * seq + t] = lse;
            r.lse_slack[(b * heads + h) * seq + t] = off;
            // Both the numerator and the sum, to first order and some.
            let p_off = 2.2 * off;
            let to = (b * seq + t) * all + h * width;
            for (key, score) in keys.clone().zip(&scores) {
                let p = (score - lse).exp() * case.mask(b, h, t, key);
                for (c, v) in part(2, key).iter().enumerate() {
                    r.out[to + c] += p * v;
                    r.out_slack[to + c] += p * v.abs() * (p_off + unit + 16.0 * UNIT);
                }
            }
            let g = &dout[to..][..width];
            let delta = dot(g, &r.out[to..][..width]);
            // Outputs come back rounded.
            let delta_off: f64 = (0..width)
                .map(|c| g[c].abs() * (r.out_slack[to + c] + (unit + 16.0 * UNIT) * r.out[to + c].abs()))
                .sum();
            for (key, score) in keys.zip(&scores) {
                let (p, mask) = ((score - lse).exp(), case.mask(b, h, t, key));
                let dp = mask * dot(g, part(2, key));
                let ds = p * (dp - delta);
                let dp_off = 16.0 * UNIT * mask * size(g, part(2, key));
                let ds_off =
                    p * (p_off * (dp - delta).abs() + dp_off + delta_off) + (unit + 16.0 * UNIT) * ds.abs();
                for c in 0..width {
                    let (q, k) = (qkv[at(0, t) + c], qkv[at(1, key) + c]);
                    r.dqkv[at(0, t) + c] += scale * ds * k;
                    r.dqkv_slack[at(0, t) + c] += scale * ds_off * k.abs();
                    r.dqkv[at(1, key) + c] += scale * ds * q;
                    r.dqkv_slack[at(1, key) + c] += scale * ds_off * q.abs();
                    r.dqkv[at(2, key) + c] += p * mask * g[c];
                    r.dqkv_slack[at(2, key) + c] += p * mask * g[c].abs() * (p_off + unit + 16.0 * UNIT);
                }
            }
        }
    }
    r
}

/// Documents of random lengths, of which the first positions of each sequence start one.
fn documents(s: AttentionShape) -> Vec<u32> {
    let ends = whole(11, s.batch * s.seq, 1 + s.seq.div_ceil(3).min(40));
    let mut starts = vec![0; s.batch * s.seq];
    for (i, starts) in starts.chunks_mut(s.seq).enumerate() {
        for t in 1..s.seq {
            starts[t] = if ends[i * s.seq + t] == 0 { t as u32 } else { starts[t - 1] };
        }
    }
    starts
}

fn dropout() -> Dropout {
    Dropout { p: 0.3, stream: Stream::new(9, Purpose::DropoutAttention, 3, 17), first_row: 5000 }
}

fn shape(batch: usize, seq: usize, heads: usize, width: usize) -> AttentionShape {
    AttentionShape { batch, seq, heads, width, among: (0, heads) }
}

fn plain(s: AttentionShape) -> Case {
    Case { s, doc_start: None, dropout: None }
}

/// A shape with everything that can be done to it.
fn cases(s: AttentionShape) -> [Case; 4] {
    [(false, false), (true, false), (false, true), (true, true)].map(|(docs, drop)| Case {
        // With documents, these are the last but one of the layer's heads.
        s: if docs { AttentionShape { among: (3, s.heads + 4), ..s } } else { s },
        doc_start: docs.then(|| documents(s)),
        dropout: drop.then(dropout),
    })
}

#[test]
fn the_reference_is_its_own_derivative() {
    for case in cases(shape(2, 7, 2, 3)) {
        let qkv = widen::<f32>(&numbers(1, case.tokens() * 3 * case.all(), 1.0));
        let dout = widen::<f32>(&numbers(2, case.tokens() * case.all(), 1.0));
        let value = |qkv: &[f64]| -> f64 {
            reference(&case, qkv, &dout, 0.0).out.iter().zip(&dout).map(|(o, d)| o * d).sum()
        };
        let want = reference(&case, &qkv, &dout, 0.0).dqkv;
        let step = 1e-5;
        for (i, want) in want.into_iter().enumerate() {
            let moved = |by: f64| {
                let mut qkv = qkv.clone();
                qkv[i] += by;
                value(&qkv)
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            assert!((slope - want).abs() < 1e-8, "dqkv {i}: {slope}, not {want}");
        }
    }
}

/// Leaves NaN in all workspace that `s` needs.
fn spoil_workspace<E: Element>(device: &Chip, s: AttentionShape) {
    let (tokens, all) = (s.batch * s.seq, s.heads * s.width);
    let (qkv, mut out) = (poisoned::<E>(device, tokens * 3 * all), poisoned::<E>(device, tokens * all));
    let mut lse = poisoned(device, s.batch * s.heads * s.seq);
    device.attention(s, &qkv, None, None, &mut out, &mut lse);
    let mut dqkv = poisoned::<E>(device, tokens * 3 * all);
    device.attention_backward(s, &qkv, None, None, &out, &lse, &out, &mut dqkv);
}

fn check<E: Element>(case: &Case, std: f32) {
    let s = case.s;
    let (tokens, all) = (case.tokens(), case.all());
    let (qkv, dout) = (numbers::<E>(1, tokens * 3 * all, std), numbers::<E>(2, tokens * all, 1.0));
    let rounding = if E::DTYPE == DType::F32 { 0.0 } else { unit(E::DTYPE) };
    let want = reference(case, &widen(&qkv), &widen(&dout), rounding);
    for (isa, got) in on_every_device(|device| {
        spoil_workspace::<E>(device, s);
        let (qkv, dout) = (put(device, &qkv), put(device, &dout));
        let doc_start = case.doc_start.as_ref().map(|d| put(device, d));
        let (mut out, mut lse) =
            (poisoned::<E>(device, tokens * all), poisoned(device, s.batch * s.heads * s.seq));
        device.attention(s, &qkv, doc_start.as_ref(), case.dropout, &mut out, &mut lse);
        let mut dqkv = poisoned::<E>(device, tokens * 3 * all);
        device.attention_backward(s, &qkv, doc_start.as_ref(), case.dropout, &out, &lse, &dout, &mut dqkv);
        vec![get(device, &out), get(device, &lse), get(device, &dqkv)]
    }) {
        let (docs, drop) = (case.doc_start.is_some(), case.dropout.is_some());
        let what = format!("{isa:?}, {}, {s:?}, documents {docs}, dropout {drop}", E::DTYPE);
        assert_close(&format!("out, {what}"), E::DTYPE, &got[0], &want.out, |i| TINY + want.out_slack[i]);
        assert_close(&format!("lse, {what}"), DType::F32, &got[1], &want.lse, |i| TINY + want.lse_slack[i]);
        assert_close(&format!("dqkv, {what}"), E::DTYPE, &got[2], &want.dqkv, |i| TINY + want.dqkv_slack[i]);
    }
}

/// Every head width of OPT and some that no register divides; lengths around every tile's edges.
const SHAPES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 1, 1),
    (3, 2, 2, 7),
    (2, 31, 3, 16),
    (1, 64, 2, 64),
    (2, 65, 1, 80),
    (1, 130, 2, 128),
    (2, 193, 1, 64),
    (1, 257, 2, 16),
    (1, 400, 1, 33),
];

#[test]
fn outputs_and_gradients_match_the_definition_in_f32() {
    for (batch, seq, heads, width) in SHAPES {
        cases(shape(batch, seq, heads, width)).iter().for_each(|case| check::<f32>(case, 1.0));
    }
}

#[test]
fn outputs_and_gradients_match_the_definition_in_bf16() {
    for (batch, seq, heads, width) in SHAPES {
        cases(shape(batch, seq, heads, width)).iter().for_each(|case| check::<bf16>(case, 1.0));
    }
}

#[test]
fn outputs_and_gradients_match_the_definition_in_f16() {
    for (batch, seq, heads, width) in SHAPES {
        cases(shape(batch, seq, heads, width)).iter().for_each(|case| check::<f16>(case, 1.0));
    }
}

#[test]
fn first_keys_need_not_be_in_order() {
    let s = shape(2, 300, 1, 8);
    let any = whole(12, s.batch * s.seq, 1 << 20);
    let doc_start = any.iter().enumerate().map(|(i, x)| x % ((i % s.seq) as u32 + 1)).collect();
    check::<f32>(&Case { s, doc_start: Some(doc_start), dropout: None }, 1.0);
    // Every position on its own: probabilities of 1.
    let alone = (0..s.batch * s.seq).map(|i| (i % s.seq) as u32).collect();
    check::<f32>(&Case { s, doc_start: Some(alone), dropout: None }, 1.0);
}

#[test]
fn large_scores_overflow_nothing() {
    // Scores of some thousands, and of some 10^30: then each row has one probability of 1.
    check::<f32>(&plain(shape(1, 100, 1, 64)), 25.0);
    check::<bf16>(&plain(shape(1, 100, 1, 64)), 25.0);
    check::<f16>(&plain(shape(1, 100, 1, 64)), 25.0);
    let s = shape(1, 70, 1, 16);
    let qkv = numbers::<f32>(1, s.seq * 3 * s.width, 1e15);
    for (isa, got) in on_every_device(|device| {
        let (qkv, mut out) = (put(device, &qkv), poisoned::<f32>(device, s.seq * s.width));
        let mut lse = poisoned(device, s.seq);
        device.attention(s, &qkv, None, None, &mut out, &mut lse);
        let mut dqkv = poisoned::<f32>(device, s.seq * 3 * s.width);
        let dout = put(device, &vec![1.0f32; s.seq * s.width]);
        device.attention_backward(s, &qkv, None, None, &out, &lse, &dout, &mut dqkv);
        vec![get(device, &out), get(device, &lse), get(device, &dqkv)]
    }) {
        assert!(got.iter().flatten().all(|x| x.is_finite()), "{isa:?}");
        for (t, out) in got[0].chunks(s.width).enumerate() {
            let from = |key: usize| &qkv[(3 * key + 2) * s.width..][..s.width];
            assert!((0..=t).any(|key| same_bits(from(key), out)), "{isa:?}: row {t} is a value's");
        }
    }
}

#[test]
fn one_more_or_less_key_would_show() {
    // The tolerance of f32 must be far below what one key of the longest shape contributes.
    let case = plain(shape(1, 257, 1, 16));
    let qkv = widen(&numbers::<f32>(1, 257 * 48, 1.0));
    let r = reference(&case, &qkv, &vec![0.0; 257 * 16], 0.0);
    let typical = 1.0 / 257.0;
    assert!(r.out_slack.iter().all(|slack| *slack < typical / 20.0), "tolerances hide a wrong mask");
}

/// Texts cut into calls, several in each, over pages that were dealt at random. Returns the outputs by text.
fn paged<E: Element>(
    device: &Chip,
    s: AttentionShape,
    texts: &[Vec<E>],
    calls: &[Vec<usize>],
) -> Vec<Vec<f32>> {
    let all = s.heads * s.width;
    let needed = |text: &Vec<E>| (text.len() / (3 * all)).div_ceil(PAGE);
    let total: usize = texts.iter().map(needed).sum();
    let order = Permutation(whole(21, 1, 1 << 20)[0] as usize, total + 2);
    let mut free = (0..total).map(|i| order.at(i) as u32);
    let pages: Vec<Vec<u32>> = texts.iter().map(|t| free.by_ref().take(needed(t)).collect()).collect();
    // Places that no token has been written to are never looked at.
    let capacity = (total + 2) * PAGE * all;
    let most = calls.iter().map(|call| call.iter().sum::<usize>()).max().unwrap_or(0);
    let mut places = Places::new(device, most, total).expect("memory");
    let (mut k, mut v) = (poisoned::<E>(device, capacity), poisoned::<E>(device, capacity));
    let (mut past, mut outs) = (vec![0; texts.len()], vec![vec![]; texts.len()]);
    for call in calls {
        let (mut segments, mut rows) = (vec![], vec![]);
        for (i, count) in call.iter().copied().enumerate() {
            segments.push(Segment { rows: count, past: past[i], pages: &pages[i] });
            rows.extend_from_slice(&texts[i][past[i] * 3 * all..(past[i] + count) * 3 * all]);
            past[i] += count;
        }
        let (qkv, mut out) = (put(device, &rows), poisoned::<E>(device, rows.len() / 3));
        places.put(device, &segments, total + 2);
        device.attention_paged(s.heads, s.width, places.placed(), &qkv, &mut k, &mut v, &mut out);
        let mut out = &get(device, &out)[..];
        for (i, count) in call.iter().copied().enumerate() {
            let (own, rest) = out.split_at(count * all);
            outs[i].extend_from_slice(own);
            out = rest;
        }
    }
    for (text, past) in texts.iter().zip(past) {
        assert_eq!(text.len(), past * 3 * all, "the calls cover the texts");
    }
    outs
}

/// A fixed order of the numbers below the second field.
struct Permutation(usize, usize);

impl Permutation {
    fn at(&self, i: usize) -> usize {
        // A step that has no factor in common with the length.
        let step = (self.0 % self.1..)
            .find(|s| (2..=*s).all(|f| !s.is_multiple_of(f) || !self.1.is_multiple_of(f)))
            .unwrap();
        (i * step + 1) % self.1
    }
}

/// Lengths of texts around the borders of pages and groups.
const LENGTHS: [usize; 5] = [1, 64, 70, 131, 200];

fn check_paged<E: Element>(heads: usize, width: usize) {
    let s = shape(1, 0, heads, width);
    let all = heads * width;
    let texts: Vec<Vec<E>> =
        LENGTHS.iter().enumerate().map(|(i, n)| numbers(30 + i, n * 3 * all, 1.0)).collect();
    // All at once; one token of each at a time; and random pieces.
    let at_once = vec![LENGTHS.to_vec()];
    let singly = (0..200).map(|i| LENGTHS.map(|n| (i < n) as usize).to_vec()).collect::<Vec<_>>();
    let mut left = LENGTHS;
    let mut random = vec![];
    while left.iter().any(|n| *n > 0) {
        let sizes = whole(40 + random.len(), left.len(), 30);
        let call: Vec<usize> = left.iter().zip(sizes).map(|(left, n)| (n as usize).min(*left)).collect();
        left.iter_mut().zip(&call).for_each(|(left, n)| *left -= n);
        random.push(call);
    }
    let rounding = if E::DTYPE == DType::F32 { 0.0 } else { unit(E::DTYPE) };
    for (isa, got) in on_every_device(|device| {
        let want = paged(device, s, &texts, &at_once);
        for calls in [&singly, &random] {
            let got = paged(device, s, &texts, calls);
            for (text, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!(same_bits(got, want), "text {text} of {heads} x {width} depends on how it is cut");
            }
        }
        // Alone, it is the same again.
        let alone = paged(device, s, &texts[3..4], &[vec![131]]);
        assert!(same_bits(&alone[0], &want[3]), "a text depends on what else is computed");
        want
    }) {
        for (text, got) in texts.iter().zip(&got) {
            let case = plain(shape(1, text.len() / (3 * all), heads, width));
            let want = reference(&case, &widen(text), &vec![0.0; case.s.seq * all], rounding);
            let what = format!("paged, {isa:?}, {}, {:?}", E::DTYPE, case.s);
            assert_close(&what, E::DTYPE, got, &want.out, |i| TINY + want.out_slack[i]);
        }
    }
}

#[test]
fn paged_attention_has_the_same_bits_in_any_batch_and_pieces() {
    for (heads, width) in [(2, 64), (1, 80), (1, 128), (3, 7), (2, 1)] {
        check_paged::<f32>(heads, width);
        check_paged::<bf16>(heads, width);
    }
}

#[test]
fn texts_share_pages_and_copies_are_texts_of_their_own() {
    let (heads, width, all) = (2, 16, 32);
    let texts: Vec<Vec<f32>> = (0..2).map(|i| numbers(60 + i, 100 * 3 * all, 1.0)).collect();
    // The second text begins with 70 tokens of the first.
    let second = [&texts[0][..70 * 3 * all], &texts[1][70 * 3 * all..]].concat();
    for (isa, got) in on_every_device(|device| {
        let size = 3 * PAGE * all;
        let (mut k, mut v) = (poisoned::<f32>(device, size), poisoned::<f32>(device, size));
        let run = |past: usize, rows: &[f32], pages: &[u32], k: &mut _, v: &mut _| {
            let count = rows.len() / (3 * all);
            let (qkv, mut out) = (put(device, rows), poisoned::<f32>(device, count * all));
            let mut places = Places::new(device, count, pages.len()).expect("memory");
            places.put(device, &[Segment { rows: count, past, pages }], 3);
            device.attention_paged(heads, width, places.placed(), &qkv, k, v, &mut out);
            get(device, &out)
        };
        run(0, &texts[0], &[2, 0], &mut k, &mut v);
        for pages in [&mut k, &mut v] {
            device.copy_blocks(PAGE * all, &[(0, 1)], pages);
        }
        let forked = run(70, &second[70 * 3 * all..], &[2, 1], &mut k, &mut v);
        let kept = run(99, &texts[0][99 * 3 * all..], &[2, 0], &mut k, &mut v);
        vec![forked, kept]
    }) {
        for (text, rows, got) in [(&second, 30, &got[0]), (&texts[0], 1, &got[1])] {
            let case = plain(shape(1, 100, heads, width));
            let want = reference(&case, &widen(text), &[0.0; 3200], 0.0);
            let from = (100 - rows) * all;
            assert_close(&format!("{isa:?}"), DType::F32, got, &want.out[from..], |i| {
                TINY + want.out_slack[from + i]
            });
        }
    }
}

/// Places of one row for each of these lists of pages, in a cache of two pages.
fn places_of(lists: &[&[u32]]) -> Places<Chip> {
    let mut places = Places::new(one_device(), 2, 1).expect("memory");
    let segments: Vec<Segment<'_>> = lists.iter().map(|pages| Segment { rows: 1, past: 0, pages }).collect();
    places.put(one_device(), &segments, 2);
    places
}

#[test]
#[should_panic(expected = "two sequences write to one page")]
fn two_texts_cannot_write_to_one_page() {
    places_of(&[&[0], &[0]]);
}

#[test]
#[should_panic(expected = "page 2 of a cache of 2")]
fn pages_are_those_of_the_cache() {
    places_of(&[&[2]]);
}

#[test]
#[should_panic(expected = "more than the 6 there is room for")]
fn rows_and_pages_have_room() {
    let mut places = Places::new(one_device(), 2, 1).expect("memory");
    places.put(one_device(), &[Segment { rows: 3, past: 0, pages: &[0] }], 2);
}

#[test]
#[should_panic(expected = "places in caches of 2 pages, which have 1")]
fn places_are_of_caches_of_this_size() {
    let device = one_device();
    let page = || device.alloc::<f32>(PAGE * 2).expect("memory");
    let (qkv, mut out) = (put(device, &[0.0f32; 6]), put(device, &[0.0f32; 2]));
    let places = places_of(&[&[0]]);
    device.attention_paged(1, 2, places.placed(), &qkv, &mut page(), &mut page(), &mut out);
}

#[test]
fn dropout_of_one_head_is_that_of_the_global_batch() {
    // The second of two sequences, alone, with its rows' place in the batch.
    let s = shape(2, 50, 3, 16);
    let qkv = numbers::<f32>(1, 100 * 3 * 48, 1.0);
    for (isa, got) in on_every_device(|device| {
        let run = |s: AttentionShape, qkv: &[f32], first_row: u64| {
            let (qkv, mut out) = (put(device, qkv), poisoned::<f32>(device, s.batch * 50 * 48));
            let mut lse = poisoned(device, s.batch * 3 * 50);
            let dropout = Some(Dropout { first_row, ..dropout() });
            device.attention(s, &qkv, None, dropout, &mut out, &mut lse);
            get(device, &out)
        };
        let both = run(s, &qkv, 0);
        vec![both[50 * 48..].to_vec(), run(shape(1, 50, 3, 16), &qkv[50 * 3 * 48..], 50)]
    }) {
        assert!(same_bits(&got[0], &got[1]), "{isa:?}");
    }
}

#[test]
fn sequences_and_heads_may_be_very_many() {
    // Together more than a GPU, or one that is emulated, has blocks in its second and third direction. Of one token, attention is
    // its value.
    let (device, batch) = (one_device(), if emulated() { 1_050 } else { 16_400 });
    let s = shape(batch, 1, 4, 1);
    let qkv: Vec<f32> = numbers(1, s.batch * 12, 1.0);
    let (mut out, mut lse) = (poisoned(device, s.batch * 4), poisoned(device, s.batch * 4));
    device.attention(s, &put(device, &qkv), None, None, &mut out, &mut lse);
    let values: Vec<f32> = qkv.chunks(12).flat_map(|token| &token[8..]).copied().collect();
    assert!(same_bits(&get(device, &out), &values));
}
