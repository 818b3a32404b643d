//! Byte-pair merges by rank (Sennrich, Haddow and Birch, 2016), as GPT-2's encoder does them: the pair of lowest rank
//! is merged everywhere in the word, from the left, and so on until no pair has a rank.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{BuildHasher, RandomState};

/// Rank of a pair that is never merged.
const NEVER: u32 = u32::MAX;

/// No token, and no neighbour.
const NONE: u32 = u32::MAX;

/// Parts of a word up to which its room is kept for the next one.
const KEPT: usize = 1 << 13;

/// Parts of a word from which on a heap finds the lowest rank, instead of a look at all pairs.
const LONG: usize = 64;

/// Which pairs of tokens are merged, in what order, and into what.
pub(super) struct Merges {
    /// Open addressing, at most half full: the pair, its rank and the token that it makes.
    slots: Vec<(u64, u32, u32)>,
    /// Odd and random, so that no file can aim at one slot. Which slot a pair has shows nowhere.
    factor: u64,
    shift: u32,
}

/// Room for a word that is being merged, used again for the next one.
#[derive(Default)]
pub(super) struct Scratch {
    parts: Vec<Part>,
    /// For long words: the parts' neighbours, the pairs by rank, and the pairs that came up in a pass.
    before: Vec<u32>,
    behind: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32)>>,
    new: Vec<Reverse<(u32, u32)>>,
}

/// A token of a word that is being merged, and what the pair of it and the next one is.
#[derive(Clone, Copy)]
struct Part {
    id: u32,
    rank: u32,
    made: u32,
}

impl Merges {
    /// The table of merges `(left, right, made)`, the first of lowest rank.
    pub fn new(merges: &[[u32; 3]]) -> Merges {
        let slots = (2 * merges.len()).next_power_of_two().max(2);
        let mut table = Merges {
            slots: vec![(u64::MAX, NEVER, NONE); slots],
            factor: RandomState::new().hash_one(slots) | 1,
            shift: 64 - slots.ilog2(),
        };
        for (rank, &[left, right, made]) in merges.iter().enumerate() {
            let slot = table.slot(left, right);
            table.slots[slot] = (pair(left, right), rank as u32, made);
        }
        table
    }

    /// Where a pair is, or would be.
    #[inline]
    fn slot(&self, left: u32, right: u32) -> usize {
        let pair = pair(left, right);
        let mut slot = (pair.wrapping_mul(self.factor) >> self.shift) as usize;
        while self.slots[slot].0 != pair && self.slots[slot].0 != u64::MAX {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        slot
    }

    /// Rank of a pair and the token that it makes.
    #[inline]
    fn find(&self, left: u32, right: u32) -> (u32, u32) {
        let (_, rank, made) = self.slots[self.slot(left, right)];
        (rank, made)
    }

    /// Merges a word that is given as the tokens of its bytes, fewer than 2^32, and appends what it becomes.
    pub fn apply(&self, word: impl Iterator<Item = u32>, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        scratch.parts.clear();
        for id in word {
            self.append(&mut scratch.parts, Part { id, rank: NEVER, made: NONE });
        }
        if scratch.parts.len() < LONG {
            self.merge_short(&mut scratch.parts);
        } else {
            self.merge_long(scratch);
        }
        ids.extend(scratch.parts.iter().map(|part| part.id).filter(|&id| id != NONE));
        if scratch.parts.capacity() > KEPT {
            *scratch = Scratch::default();
        }
    }

    /// Puts a part behind the others, and finds out what the pair of the last one and it is.
    #[inline]
    fn append(&self, parts: &mut Vec<Part>, part: Part) {
        if let Some(last) = parts.last_mut() {
            (last.rank, last.made) = self.find(last.id, part.id);
        }
        parts.push(part);
    }

    fn merge_short(&self, parts: &mut Vec<Part>) {
        loop {
            let lowest = parts.iter().map(|part| part.rank).min().unwrap_or(NEVER);
            if lowest == NEVER {
                return;
            }
            let (mut read, mut written) = (0, 0);
            // Whether the part that was written last is a new one.
            let mut fresh = false;
            while let Some(&part) = parts.get(read) {
                let merged = part.rank == lowest;
                let part = if merged { Part { id: part.made, rank: NEVER, made: NONE } } else { part };
                read += 1 + usize::from(merged);
                if written > 0 && (merged || fresh) {
                    let left = parts[written - 1].id;
                    (parts[written - 1].rank, parts[written - 1].made) = self.find(left, part.id);
                }
                parts[written] = part;
                written += 1;
                fresh = merged;
            }
            parts.truncate(written);
        }
    }

    /// The same in time n log n: parts know their neighbours, and a heap holds the ranks. Parts that are gone have the
    /// id `NONE` afterwards.
    fn merge_long(&self, scratch: &mut Scratch) {
        let Scratch { parts, before, behind, heap, new } = scratch;
        let count = parts.len() as u32;
        before.clear();
        before.extend((0..count).map(|i| i.wrapping_sub(1)));
        behind.clear();
        behind.extend((1..count).chain([NONE]));
        let ranked = (0..count).map(|at| (parts[at as usize].rank, at)).filter(|&(rank, _)| rank != NEVER);
        heap.extend(ranked.map(Reverse));
        while let Some(&Reverse((lowest, _))) = heap.peek() {
            // One pass over the word, from the left. Pairs that come up in it wait for its end, whatever their rank.
            while let Some(&Reverse((rank, at))) = heap.peek()
                && rank == lowest
            {
                heap.pop();
                // A merge beside it may have taken the pair away.
                if parts[at as usize].rank != rank {
                    continue;
                }
                let right = behind[at as usize];
                parts[at as usize].id = parts[at as usize].made;
                parts[right as usize] = Part { id: NONE, rank: NEVER, made: NONE };
                let next = behind[right as usize];
                behind[at as usize] = next;
                if next != NONE {
                    before[next as usize] = at;
                }
                for left in [before[at as usize], at] {
                    let Some(&right) = behind.get(left as usize) else { continue };
                    let (rank, made) = match parts.get(right as usize) {
                        Some(part) => self.find(parts[left as usize].id, part.id),
                        None => (NEVER, NONE),
                    };
                    (parts[left as usize].rank, parts[left as usize].made) = (rank, made);
                    if rank != NEVER {
                        new.push(Reverse((rank, left)));
                    }
                }
            }
            heap.extend(new.drain(..));
        }
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_device::rng::{Purpose, Stream};

    /// GPT-2's published loop, word for word.
    fn reference(merges: &[[u32; 3]], word: &[u32]) -> Vec<u32> {
        let mut word = word.to_vec();
        loop {
            let rank = |pair: &[u32]| merges.iter().position(|m| m[..2] == *pair);
            let Some(lowest) = word.windows(2).filter_map(rank).min() else { return word };
            let [left, right, made] = merges[lowest];
            let mut next = Vec::new();
            let mut i = 0;
            while i < word.len() {
                if word[i..].starts_with(&[left, right]) {
                    next.push(made);
                    i += 2;
                } else {
                    next.push(word[i]);
                    i += 1;
                }
            }
            word = next;
        }
    }

    /// Merges of random pairs over four letters, with ranks in any order: a file may list a merge before the merge that
    /// makes its half.
    fn random_merges(seed: usize) -> Vec<[u32; 3]> {
        let stream = Stream::new(seed as u64, Purpose::Sampling, 0, 0);
        let mut tokens: Vec<Vec<u8>> = (0..4).map(|letter| vec![letter]).collect();
        let mut merges: Vec<[u32; 3]> = Vec::new();
        for i in 0..40 {
            let pick = |which| stream.word(i, which) as usize % tokens.len();
            let (left, right) = (pick(0), pick(1));
            let bytes = [tokens[left].as_slice(), &tokens[right]].concat();
            let made = tokens.iter().position(|t| *t == bytes).unwrap_or(tokens.len());
            let pair = [left as u32, right as u32];
            if merges.iter().all(|m| m[..2] != pair) {
                merges.push([pair[0], pair[1], made as u32]);
                if made == tokens.len() {
                    tokens.push(bytes);
                }
            }
        }
        for i in (1..merges.len()).rev() {
            merges.swap(i, stream.word(99, i) as usize % (i + 1));
        }
        merges
    }

    #[test]
    fn words_of_any_length_are_merged_as_gpt2_does() {
        for seed in 0..60 {
            let merges = random_merges(seed);
            let table = Merges::new(&merges);
            let stream = Stream::new(seed as u64, Purpose::Sampling, 1, 0);
            for (row, len) in (0..).zip([0, 1, 2, 3, 5, 9, 20, LONG - 1, LONG, LONG + 1, 200, 333]) {
                // Runs of one letter too, where pairs overlap.
                let letters = 1 + stream.word(row, len) % 4;
                let word: Vec<u32> = (0..len).map(|i| stream.word(row, i) % letters).collect();
                let mut ids = vec![7];
                table.apply(word.iter().copied(), &mut Scratch::default(), &mut ids);
                assert_eq!(ids[1..], reference(&merges, &word), "seed {seed}, {word:?}");
            }
        }
    }

    #[test]
    fn no_merges_leave_bytes() {
        let mut ids = vec![];
        Merges::new(&[]).apply([3, 1, 2].into_iter(), &mut Scratch::default(), &mut ids);
        assert_eq!(ids, [3, 1, 2]);
    }
}
