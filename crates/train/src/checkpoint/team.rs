//! The ranks that write and read checkpoints together.

use super::mirror::Unreachable;
use anyhow::{Context, Result, anyhow};
use std::ops::Range;
use std::time::{Duration, Instant};

/// One rank of several among whom work is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub of: usize,
}

impl Share {
    /// All of the work.
    pub fn alone() -> Share {
        Share { rank: 0, of: 1 }
    }

    /// The other ranks.
    pub(super) fn others(self) -> impl Iterator<Item = usize> {
        let all: Range<usize> = 0..self.of;
        all.filter(move |rank| *rank != self.rank)
    }

    /// Which of `sizes` are this rank's, as [`deal`] has it.
    pub(super) fn pick(self, sizes: &[u64]) -> Vec<bool> {
        deal(sizes, self.of).into_iter().map(|rank| rank == self.rank).collect()
    }
}

/// The rank that each of `sizes` falls to, so that all ranks have about as much: the largest first, each to the rank that has
/// least.
pub(crate) fn deal(sizes: &[u64], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(sizes[index]));
    let mut load = vec![0; ranks];
    let mut dealt = vec![0; sizes.len()];
    for index in order {
        let least = (0..ranks).min_by_key(|&rank| load[rank]).unwrap_or(0);
        load[least] += sizes[index].max(1);
        dealt[index] = least;
    }
    dealt
}

/// Ranks that write checkpoints into one folder, as one of them sees them. They share the folder (a file system that all
/// of them reach) and send no messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Team {
    /// Which rank this is.
    pub share: Share,
    /// A number that is the same on all ranks and new whenever the run is started, so that what is left of an earlier
    /// start is never mixed with a new one.
    pub attempt: u64,
    /// How long to wait for other ranks once this one's part is on disk.
    pub patience: Duration,
}

impl Team {
    /// A run of one rank.
    pub fn alone() -> Team {
        Team { share: Share::alone(), attempt: std::process::id().into(), patience: Duration::ZERO }
    }
}

/// What becomes of something that every rank has done its share of: it succeeded if it did on all, and otherwise all have
/// the failure of the first rank that failed, or as much of it as can be told: its text, and whether it is an [`Unreachable`]. The outer error is that of `exchange`.
pub(super) fn agree<T>(
    mine: Result<T>,
    exchange: &mut impl FnMut(&[u8]) -> Result<Vec<Vec<u8>>>,
) -> Result<Result<T>> {
    let complaint = mine.as_ref().err().map(|error| (format!("{error:#}"), error.is::<Unreachable>()));
    let told = exchange(&serde_json::to_vec(&complaint)?)?;
    let by = |rank: usize| if told.len() > 1 { format!(" (found by rank {rank})") } else { String::new() };
    for (rank, told) in told.iter().enumerate() {
        let complaint: Option<(String, bool)> =
            serde_json::from_slice(told).with_context(|| format!("what rank {rank} told is garbled"))?;
        if let Some((text, unreachable)) = complaint {
            let text = text + &by(rank);
            return Ok(Err(if unreachable { Unreachable(text).into() } else { anyhow!(text) }));
        }
    }
    Ok(mine)
}

/// Waits for other ranks by looking again and again, less and less often.
pub(super) struct Wait {
    until: Option<Instant>,
    pause: Duration,
}

impl Wait {
    /// Far less than a save takes, and few enough looks for the busiest file server.
    const LONGEST_PAUSE: Duration = Duration::from_millis(200);

    pub(super) fn new(patience: Duration) -> Wait {
        Wait { until: Instant::now().checked_add(patience), pause: Duration::from_millis(2) }
    }

    /// Sleeps a little; false when the time is over, or `hurry` has passed.
    pub(super) fn pause(&mut self, hurry: Option<Instant>) -> bool {
        let now = Instant::now();
        if [self.until, hurry].into_iter().flatten().any(|until| now >= until) {
            return false;
        }
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 3 / 2).min(Wait::LONGEST_PAUSE);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ranks_have_the_failure_of_the_first_that_failed() {
        let heard = |mine: Result<()>, others: &[&[u8]]| {
            let mut said = Vec::new();
            let agreed = agree(mine, &mut |bytes| {
                said = bytes.to_vec();
                Ok(others.iter().copied().chain([bytes]).map(<[u8]>::to_vec).collect())
            });
            (agreed.unwrap().map_err(|error| (format!("{error:#}"), error.is::<Unreachable>())), said)
        };
        let (fine, said_fine) = heard(Ok(()), &[]);
        assert_eq!(fine, Ok(()));
        let (_, damaged) = heard(Err(anyhow!("damaged")), &[]);
        let (_, down) = heard(Err(Unreachable("down".into()).into()), &[]);
        assert_eq!(
            heard(Ok(()), &[&said_fine, &damaged]).0,
            Err(("damaged (found by rank 1)".into(), false))
        );
        assert_eq!(heard(Err(anyhow!("damaged")), &[&down]).0, Err(("down (found by rank 0)".into(), true)));
    }

    #[test]
    fn every_file_is_one_ranks_and_all_have_about_as_much() {
        let sizes = [70, 10, 0, 30, 30, 30, 0, 40];
        for of in 1..=9 {
            let picks: Vec<_> = (0..of).map(|rank| Share { rank, of }.pick(&sizes)).collect();
            for index in 0..sizes.len() {
                assert_eq!(picks.iter().filter(|pick| pick[index]).count(), 1, "{index} of {of}");
            }
            let load = |pick: &Vec<bool>| -> u64 {
                pick.iter().zip(sizes).map(|(&p, s)| if p { s } else { 0 }).sum()
            };
            let most = picks.iter().map(load).max().unwrap();
            assert!(most <= 70.max(210 / of as u64 + 40), "{of}: {most}");
        }
    }
}
