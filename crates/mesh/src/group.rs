//! Collective operations between some of the ranks. All are exchanges between pairs: every rank sends each other its part at
//! once, which is as many bytes as a ring takes. Sums are made here, in the order of the ranks and in f32, so
//! that they depend neither on the transport nor on who is faster.
//!
//! Where the devices of a group are linked ([`Mesh::linked`](crate::Mesh::linked)) and reach a buffer, they do the operation
//! instead, beside what they compute, and its sums in an order of their own. What is counted is the same.

use crate::label::{Label, Operation};
use crate::memory::{Copied, Touched, given_back};
use crate::pending::Pending;
use crate::reactor::{Command, Failed, Finished, Job, Memory, Place};
use crate::route::Linked;
use crate::world::World;
use anyhow::{Context, Result, bail};
use ferropt_device::{AtRest, Buffer, DType, Element, Exchange, bf16, f16};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

/// Sums of at most so many bytes are made by every rank from all parts, instead of in parts that are then gathered.
pub const SMALL_SUM: usize = 1 << 14;
/// Most bytes that one rank may give to a gathering.
pub(crate) const LARGEST_GATHERED: u64 = 1 << 30;
/// Elements that are summed at a time: what stays in the first-level cache.
const TILE: usize = 2048;

/// Some ranks of a world, in an order. All of them call the same operations in the same order. Clones are the same group.
#[derive(Clone)]
pub struct Group(Arc<Inner>);

pub(crate) struct Inner {
    world: World,
    pub(crate) name: &'static str,
    /// Ranks of the world.
    members: Vec<usize>,
    rank: usize,
    pub(crate) linked: Linked,
}

impl Group {
    /// Those ranks of `world`, of which this is one.
    ///
    /// # Errors
    /// When a rank is listed twice or does not exist, or this one is not listed.
    pub(crate) fn new(world: &World, members: &[usize], name: &'static str) -> Result<Group> {
        let (me, size) = (world.rank(), world.size());
        for (place, member) in members.iter().enumerate() {
            if *member >= size || members[..place].contains(member) {
                bail!(
                    "group {name} lists rank {member}, which is there twice or is none of the {size} ranks"
                );
            }
        }
        let rank = members.iter().position(|member| *member == me);
        let rank =
            rank.with_context(|| format!("group {name} of ranks {members:?} does not have rank {me}"))?;
        let (world, members) = (world.clone(), members.to_vec());
        Ok(Group(Arc::new(Inner { world, name, members, rank, linked: Linked::No })))
    }

    /// The same ranks, whose devices exchange memory themselves.
    pub(crate) fn with(&self, linked: Linked) -> Group {
        let Inner { world, name, members, rank, .. } = &*self.0;
        let (world, members) = (world.clone(), members.clone());
        Group(Arc::new(Inner { world, name, members, rank: *rank, linked }))
    }

    /// The only rank of a world.
    pub(crate) fn alone(world: &World) -> Group {
        let (world, members) = (world.clone(), vec![0]);
        Group(Arc::new(Inner { world, name: "alone", members, rank: 0, linked: Linked::No }))
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    /// All ranks, of which these are some.
    pub(crate) fn world(&self) -> &World {
        &self.0.world
    }

    /// Number of this rank in the group.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Number of its ranks.
    pub fn size(&self) -> usize {
        self.0.members.len()
    }

    /// Number in the world of a member.
    pub fn world_rank(&self, member: usize) -> usize {
        self.0.members[member]
    }

    pub(crate) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank(), self.size());
        // Every rank begins with its neighbour, so that not all send to the same one first.
        (1..size).map(move |step| (rank + step) % size)
    }

    /// Elements that this rank sends where each sends a part of so many to each other one.
    pub(crate) fn sent_in_parts(&self, len: usize) -> usize {
        (self.size() - 1) * (len / self.size())
    }

    /// Elements that this rank sends in a sum of whole buffers.
    pub(crate) fn sent_in_sum<T: Element>(&self, len: usize) -> usize {
        let (others, own) = (self.size() - 1, even_parts(len, self.size())(self.rank()).len());
        if is_small_sum::<T>(len) { others * len } else { len - own + others * own }
    }

    /// Gathers the parts of all: `buffer` has as many equal parts as there are ranks, and this rank's own is in its place.
    pub fn all_gather<T: Element, B: Buffer<T> + 'static>(&self, label: Label, buffer: B) -> Pending<B> {
        let equal = equal_parts(buffer.len(), self.size());
        if let Some(route) = self.route(&buffer) {
            let sent = self.sent_in_parts(buffer.len());
            return self.exchange(route, Exchange::AllGather, label, buffer, sent);
        }
        self.gather_parts(Operation::AllGather, label, buffer, equal)
    }

    /// [`Group::all_gather`] of parts of any lengths: `range` says which elements are a rank's.
    fn gather_parts<T: Element, B: Buffer<T> + 'static>(
        &self,
        operation: Operation,
        label: Label,
        buffer: B,
        range: impl Fn(usize) -> Range<usize>,
    ) -> Pending<B> {
        if self.size() == 1 {
            return Pending::ready(Ok(buffer));
        }
        let bytes = |member: usize| in_bytes::<T>(range(member));
        let sends = self.others().map(|member| (member, bytes(self.rank()))).collect();
        let receives = self.others().map(|member| (member, Place::Memory(bytes(member)))).collect();
        let touched = Touched { reads: range(self.rank()), writes: 0..buffer.len() };
        self.start::<T, B>(operation, label, buffer, touched, sends, receives, |finished| {
            given_back(finished.memory)
        })
    }

    /// Sums the contributions of all: `buffer` has as many equal parts as there are ranks, and afterwards this rank's own
    /// part, in its place, is the sum over all ranks. The other parts are not to be used.
    pub fn reduce_scatter<T: Element, B: Buffer<T> + 'static>(&self, label: Label, buffer: B) -> Pending<B> {
        let sum = match summing(T::DTYPE) {
            Ok(sum) => sum,
            Err(error) => return Pending::ready(Err(error)),
        };
        let equal = equal_parts(buffer.len(), self.size());
        if let Some(route) = self.route(&buffer) {
            let sent = self.sent_in_parts(buffer.len());
            return self.exchange(route, Exchange::ReduceScatter, label, buffer, sent);
        }
        self.sum_parts::<T, B>(Operation::ReduceScatter, sum, label, buffer, equal)
    }

    /// This rank's range becomes the sum of what all have there; `range` says which elements are a rank's.
    fn sum_parts<T: Element, B: Buffer<T> + 'static>(
        &self,
        operation: Operation,
        sum: Sum,
        label: Label,
        buffer: B,
        range: impl Fn(usize) -> Range<usize>,
    ) -> Pending<B> {
        if self.size() == 1 {
            return Pending::ready(Ok(buffer));
        }
        let (rank, own) = (self.rank(), range(self.rank()));
        let sends = self.others().map(|member| (member, in_bytes::<T>(range(member)))).collect();
        let place = |(piece, member)| (member, Place::Piece(piece, Some(size_of::<T>() * own.len())));
        let receives = self.others().enumerate().map(place).collect();
        // In the order of the ranks: which piece each one's contribution is.
        let mut order: Vec<(usize, Option<usize>)> =
            self.others().enumerate().map(|(piece, member)| (member, Some(piece))).collect();
        order.push((rank, None));
        order.sort_unstable();
        let touched = Touched { reads: 0..buffer.len(), writes: own.clone() };
        self.start::<T, B>(operation, label, buffer, touched, sends, receives, move |mut finished| {
            let own = &mut finished.memory.bytes_mut()[in_bytes::<T>(own)];
            let pieces: Vec<Option<&[u8]>> =
                order.iter().map(|(_, piece)| piece.map(|p| finished.pieces[p].bytes())).collect();
            sum(own, &pieces);
            given_back(finished.memory)
        })
    }

    /// Sums whole buffers of any length; all ranks get the same bits. Large ones are gathered in `wait`, or before that in
    /// [`Pending::proceed`], so all ranks call that for them in the same order.
    pub fn all_reduce<T: Element, B: Buffer<T> + 'static>(&self, label: Label, buffer: B) -> Pending<B> {
        let (size, len, operation) = (self.size(), buffer.len(), Operation::AllReduce);
        let sum = match summing(T::DTYPE) {
            Ok(sum) => sum,
            Err(error) => return Pending::ready(Err(error)),
        };
        if size == 1 {
            return Pending::ready(Ok(buffer));
        }
        if let Some(route) = self.route(&buffer) {
            let sent = self.sent_in_sum::<T>(len);
            return self.exchange(route, Exchange::AllReduce, label, buffer, sent);
        }
        if is_small_sum::<T>(len) {
            return self.sum_parts::<T, B>(operation, sum, label, buffer, move |_| 0..len);
        }
        let group = self.clone();
        let summed = self.sum_parts::<T, B>(operation, sum, label, buffer, even_parts(len, size));
        summed.then(move |buffer| group.gather_parts::<T, B>(operation, label, buffer, even_parts(len, size)))
    }

    /// Gives all what `from` has.
    pub fn broadcast<T: Element, B: Buffer<T> + 'static>(
        &self,
        label: Label,
        from: usize,
        buffer: B,
    ) -> Pending<B> {
        if self.size() == 1 {
            return Pending::ready(Ok(buffer));
        }
        if let Some(route) = self.route(&buffer) {
            let sent = if self.rank() == from { (self.size() - 1) * buffer.len() } else { 0 };
            return self.exchange(route, Exchange::Broadcast { from }, label, buffer, sent);
        }
        let all = 0..buffer.len() * size_of::<T>();
        let (touched, sends, receives) = if self.rank() == from {
            let sends = self.others().map(|member| (member, all.clone())).collect();
            (Touched::sent(buffer.len()), sends, Vec::new())
        } else {
            (Touched::received(buffer.len()), Vec::new(), vec![(from, Place::Memory(all))])
        };
        self.start::<T, B>(Operation::Broadcast, label, buffer, touched, sends, receives, |finished| {
            given_back(finished.memory)
        })
    }

    /// Sends a buffer to another member, which calls [`Group::receive`].
    pub fn send<T: Element, B: Buffer<T> + 'static>(&self, label: Label, to: usize, buffer: B) -> Pending<B> {
        if let Some(route) = self.route_to(to, &buffer) {
            let sent = buffer.len();
            return self.exchange(route, Exchange::Send { to: 1 }, label, buffer, sent);
        }
        let all = 0..buffer.len() * size_of::<T>();
        let touched = Touched::sent(buffer.len());
        self.start::<T, B>(Operation::Send, label, buffer, touched, vec![(to, all)], Vec::new(), |finished| {
            given_back(finished.memory)
        })
    }

    /// Receives a buffer's content from another member.
    pub fn receive<T: Element, B: Buffer<T> + 'static>(
        &self,
        label: Label,
        from: usize,
        buffer: B,
    ) -> Pending<B> {
        if let Some(route) = self.route_from(from, &buffer) {
            return self.exchange(route, Exchange::Receive { from: 0 }, label, buffer, 0);
        }
        let all = Place::Memory(0..buffer.len() * size_of::<T>());
        let touched = Touched::received(buffer.len());
        self.start::<T, B>(
            Operation::Send,
            label,
            buffer,
            touched,
            Vec::new(),
            vec![(from, all)],
            |finished| given_back(finished.memory),
        )
    }

    /// A few bytes of every member, in the order of the members; lengths may differ.
    ///
    /// # Errors
    /// When another rank is lost.
    pub fn gather_bytes(&self, label: Label, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.gather(label, bytes, false)
    }

    /// [`Group::gather_bytes`] behind work of a rank that may take any time, such as reading a terabyte: the others wait as long
    /// as it lives.
    ///
    /// # Errors
    /// When another rank is lost.
    pub fn gather_bytes_whenever(&self, label: Label, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.gather(label, bytes, true)
    }

    fn gather(&self, label: Label, bytes: &[u8], whenever: bool) -> Result<Vec<Vec<u8>>> {
        if self.size() == 1 {
            return Ok(vec![bytes.to_vec()]);
        }
        let sends = self.others().map(|member| (member, 0..bytes.len())).collect();
        let receives =
            self.others().enumerate().map(|(piece, member)| (member, Place::Piece(piece, None))).collect();
        let memory = Box::new(bytes.to_vec());
        let done = self.post(Operation::Gather, label, None, memory, sends, receives, whenever)?;
        let finished = Pending::waiting(done, Ok).wait()?;
        let mut all = vec![bytes.to_vec(); self.size()];
        for (member, piece) in self.others().zip(&finished.pieces) {
            all[member] = piece.bytes().to_vec();
        }
        Ok(all)
    }

    /// A few numbers of every member, in the order of the members.
    ///
    /// # Errors
    /// When another rank is lost.
    pub fn gather_f64(&self, label: Label, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let all = self.gather_bytes(label, &bytes)?;
        Ok(all
            .iter()
            .map(|bytes| bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
            .collect())
    }

    /// Waits until every member is here.
    ///
    /// # Errors
    /// When another rank is lost.
    pub fn barrier(&self, label: Label) -> Result<()> {
        self.gather_bytes(label, &[]).map(drop)
    }

    /// Starts an operation on a buffer; ranks are numbers of members.
    fn start<T: Element, B: Buffer<T> + 'static>(
        &self,
        operation: Operation,
        label: Label,
        buffer: B,
        touched: Touched,
        sends: Vec<(usize, Range<usize>)>,
        receives: Vec<(usize, Place)>,
        finish: impl FnOnce(Finished) -> Result<B> + Send + 'static,
    ) -> Pending<B> {
        let memory: Box<dyn Memory> = match AtRest::<T, B>::new(buffer) {
            Ok(at_rest) => Box::new(at_rest),
            Err(buffer) => Box::new(Copied::new(buffer, touched)),
        };
        match self.post(operation, label, Some(T::DTYPE), memory, sends, receives, false) {
            Ok(done) => Pending::waiting(done, finish),
            Err(error) => Pending::ready(Err(error)),
        }
    }

    fn post(
        &self,
        operation: Operation,
        label: Label,
        dtype: Option<DType>,
        memory: Box<dyn Memory>,
        sends: Vec<(usize, Range<usize>)>,
        receives: Vec<(usize, Place)>,
        whenever: bool,
    ) -> Result<Receiver<Result<Finished, Failed>>> {
        let Inner { world, name, members, .. } = &*self.0;
        world.give_back();
        let bytes = sends.iter().map(|(_, range)| range.len() as u64).sum();
        world.count(name, operation, bytes);
        let (done, finished) = channel();
        let job = Job {
            operation,
            group: name,
            label,
            dtype,
            memory,
            sends: sends.into_iter().map(|(member, range)| (members[member], range)).collect(),
            receives: receives.into_iter().map(|(member, place)| (members[member], place)).collect(),
            whenever,
            done,
        };
        world.command(Command::Post(job))?;
        Ok(finished)
    }
}

/// Which elements are a member's when all have equally many.
fn equal_parts(len: usize, size: usize) -> impl Fn(usize) -> Range<usize> {
    let part = len / size;
    move |member| member * part..(member + 1) * part
}

/// Which elements of any number are a member's: the last parts may be shorter, or empty.
fn even_parts(len: usize, size: usize) -> impl Fn(usize) -> Range<usize> {
    let part = len.div_ceil(size);
    move |member| (member * part).min(len)..((member + 1) * part).min(len)
}

/// Whether every rank makes all of a sum.
fn is_small_sum<T>(len: usize) -> bool {
    len * size_of::<T>() <= SMALL_SUM
}

/// Where elements lie in a buffer's bytes.
fn in_bytes<T>(elements: Range<usize>) -> Range<usize> {
    elements.start * size_of::<T>()..elements.end * size_of::<T>()
}

/// Makes the first the sum of the contributions, in their order; it is the one that is not a piece itself.
type Sum = fn(&mut [u8], &[Option<&[u8]>]);

/// How elements of a type are summed. Not generic, so that it is compiled once and here: as fast in builds that do not optimise
/// what is above.
pub(crate) fn summing(dtype: DType) -> Result<Sum> {
    match dtype {
        DType::F32 => Ok(sum::<f32>),
        DType::Bf16 => Ok(sum::<bf16>),
        DType::F16 => Ok(sum::<f16>),
        other => bail!("{other} is no type to sum in; f32, bf16 and f16 are"),
    }
}

fn sum<T: Element>(own: &mut [u8], pieces: &[Option<&[u8]>]) {
    let own: &mut [T] = bytemuck::cast_slice_mut(own);
    let pieces: Vec<Option<&[T]>> = pieces.iter().map(|piece| piece.map(bytemuck::cast_slice)).collect();
    let mut tile = [0.0f32; TILE];
    for start in (0..own.len()).step_by(TILE) {
        let range = start..own.len().min(start + TILE);
        let sums = &mut tile[..range.len()];
        sums.fill(0.0);
        for piece in &pieces {
            let values = piece.map_or(&own[range.clone()], |piece| &piece[range.clone()]);
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value.to_f32();
            }
        }
        for (out, sum) in own[range].iter_mut().zip(sums) {
            *out = T::from_f32(*sum);
        }
    }
}
