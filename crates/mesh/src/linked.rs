//! Links between the devices of a mesh's ranks: all of them open theirs, or none does.
//!
//! Links are opened one after the other, in the same order on all ranks, and after each step all agree whether it went well: no
//! rank goes on to wait for one that has given up. Each is tried, because the first exchange is when devices connect.

use crate::group::Group;
use crate::label::Label;
use crate::mesh::Mesh;
use crate::reactor::Command;
use crate::route::{Linked, Neighbour};
use anyhow::{Result, ensure};
use ferropt_device::{Device, Exchange, Flight, Link, Network};
use std::fmt;
use std::sync::Arc;

const LABEL: Label = Label::new("links");

/// Why there are no links: what all ranks agree on.
#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl Mesh {
    /// The same mesh, in which devices exchange memory themselves where every rank's can, and what people are told about that.
    /// Otherwise copies go through the hosts' memory, which is all that is needed where memory is the hosts' anyway. All ranks
    /// call it, before anything else has a copy of a group.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn linked<D: Device>(self, device: &D) -> Result<(Mesh, Option<String>)> {
        let network = match device.network() {
            Some(network) if self.world.size() > 1 => network,
            _ => return Ok((self, None)),
        };
        let mut opening = Opening { all: &self.all, device, opened: Vec::new() };
        match opening.all_links(&self, network) {
            Ok((mesh, name)) => {
                Ok((mesh, Some(format!("ranks exchange their devices' memory through {name}"))))
            }
            Err(error) => {
                let opened = opening.opened;
                let Refused(why) = error.downcast()?;
                opened.iter().for_each(|link| link.abort());
                let line = "ranks exchange copies of their devices' memory in the hosts' memory";
                Ok((self, Some(format!("{line}: {why}"))))
            }
        }
    }
}

struct Opening<'a, D: Device> {
    all: &'a Group,
    device: &'a D,
    opened: Vec<Arc<dyn Link>>,
}

impl<D: Device> Opening<'_, D> {
    /// The mesh with its links, and what they are.
    fn all_links(&mut self, mesh: &Mesh, network: Result<Box<dyn Network>>) -> Result<(Mesh, String)> {
        let network = self.agree(network)?;
        let name = network.describe();
        let names = self.all.gather_bytes(LABEL, name.as_bytes())?;
        let other = names.iter().position(|other| *other != names[0]);
        let name = self.agree(match other {
            None => Ok(name),
            Some(rank) => {
                let of = |rank: usize| String::from_utf8_lossy(&names[rank]);
                Err(anyhow::anyhow!("it has {}, and rank 0 has {}", of(rank), of(0)))
            }
        })?;

        let mut linked = mesh.clone();
        for group in [&mut linked.tensor, &mut linked.shard, &mut linked.replicate] {
            if group.size() > 1 {
                let link = self.link(&*network, Some(&*group), Exchange::AllReduce)?;
                *group = group.with(link.map_or(Linked::No, Linked::All));
            }
        }
        if mesh.pipeline.size() > 1 {
            linked.pipeline = mesh.pipeline.with(Linked::Neighbours(self.neighbours(mesh, &*network)?));
            let link = self.link(&*network, mesh.ends.as_ref(), Exchange::AllReduce)?;
            linked.ends = mesh.ends.as_ref().zip(link).map(|(ends, link)| ends.with(Linked::All(link)));
        }
        Ok((linked, name))
    }

    /// Links to the stages before and after, one for each direction: an exchange waits for those before it on its link, and
    /// what goes forward must not wait for what comes back.
    fn neighbours(&mut self, mesh: &Mesh, network: &dyn Network) -> Result<Vec<Neighbour>> {
        let (me, stages) = (mesh.pipeline.rank(), mesh.pipeline.size());
        let mut neighbours = Vec::new();
        // Stages 0 and 1, 2 and 3, and so on at once; then 1 and 2, 3 and 4.
        for parity in [0, 1] {
            let first = if me % 2 == parity { Some(me) } else { me.checked_sub(1) };
            let pair = first.filter(|first| first + 1 < stages).map(|first| [first, first + 1]);
            let group = |from: usize, to: usize| {
                let members = [from, to].map(|member| mesh.pipeline.world_rank(member));
                mesh.world.group(&members, "neighbours")
            };
            let forward = pair.map(|[one, other]| group(one, other)).transpose()?;
            let forward = self.link(network, forward.as_ref(), Exchange::Send { to: 1 })?;
            let back = pair.map(|[one, other]| group(other, one)).transpose()?;
            let back = self.link(network, back.as_ref(), Exchange::Send { to: 1 })?;
            if let (Some([one, other]), Some(forward), Some(back)) = (pair, forward, back) {
                neighbours.push(match me == one {
                    true => Neighbour { member: other, to: forward, from: back },
                    false => Neighbour { member: one, to: back, from: forward },
                });
            }
        }
        Ok(neighbours)
    }

    /// A link between the members of a group, which has been tried, if this rank is one of them. All ranks call it.
    fn link(
        &mut self,
        network: &dyn Network,
        group: Option<&Group>,
        trial: Exchange,
    ) -> Result<Option<Arc<dyn Link>>> {
        let link = group.map(|group| self.open(network, group)).transpose();
        let link = self.agree(link)?;
        let tried = match (group, &link) {
            (Some(group), Some(link)) => self.try_out(group, &**link, trial),
            _ => Ok(()),
        };
        self.agree(tried)?;
        Ok(link)
    }

    fn open(&mut self, network: &dyn Network, group: &Group) -> Result<Arc<dyn Link>> {
        let invitation = if group.rank() == 0 { network.invite() } else { Ok(Vec::new()) };
        let given = group.gather_bytes(LABEL, invitation.as_deref().unwrap_or_default())?;
        invitation?;
        ensure!(!given[0].is_empty(), "rank {} did not invite the others", group.world_rank(0));
        let world = group.world();
        let give_up = || world.alive().is_err();
        let link = network.open(&given[0], group.rank(), group.size(), &give_up)?;
        world.command(Command::Open(Arc::downgrade(&link)))?;
        self.opened.push(link.clone());
        Ok(link)
    }

    /// Sums or sends the number 1.
    fn try_out(&self, group: &Group, link: &dyn Link, trial: Exchange) -> Result<()> {
        let (exchange, expected) = match (trial, group.rank()) {
            (Exchange::Send { .. }, 1) => (Exchange::Receive { from: 0 }, 1.0),
            (Exchange::Send { .. }, _) => (trial, 1.0),
            _ => (trial, group.size() as f32),
        };
        let mut buffer = self.device.alloc::<f32>(1)?;
        self.device.fill(&mut buffer, if matches!(exchange, Exchange::Receive { .. }) { 0.0 } else { 1.0 });
        let (buffer, mut got) = (Flight::start::<f32>(link, exchange, buffer)?.land()?, [0.0]);
        self.device.download(&buffer, 0, &mut got);
        ensure!(got == [expected], "a trial of {exchange:?} gave {} instead of {expected}", got[0]);
        Ok(())
    }

    /// What this rank has, if all have theirs.
    fn agree<T>(&self, mine: Result<T>) -> Result<T> {
        let wrong = mine.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
        let all = self.all.gather_bytes(LABEL, wrong.as_bytes())?;
        match all.iter().position(|wrong| !wrong.is_empty()) {
            None => mine,
            Some(rank) => {
                Err(Refused(format!("rank {rank}: {}", String::from_utf8_lossy(&all[rank]))).into())
            }
        }
    }
}
