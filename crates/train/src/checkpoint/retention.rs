//! Which checkpoints to keep.

/// How many checkpoints stay on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many; 0 means 1, because the newest is never deleted. Those that were saved before they were due, as at
    /// a stop, do not count.
    pub keep_last: usize,
    /// Also every checkpoint whose step is a multiple of this.
    pub keep_every: Option<u64>,
}

/// A whole checkpoint, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) step: u64,
    pub(super) rollbacks: u64,
    /// Whether it was saved before one was due.
    pub(super) early: bool,
}

impl Retention {
    /// Keeps everything.
    pub const ALL: Retention = Retention { keep_last: usize::MAX, keep_every: None };

    /// Steps of `whole` to delete now that the checkpoint of step `newest` is safe on disk. A roll-back may have to go back to
    /// step `way_back` or before, and whatever the numbers say, the newest checkpoint that is so old stays; also the next
    /// newer one, which takes its place in time. Where none is so old, the oldest stays.
    ///
    /// Later steps are left alone and do not count: they are from a run that was resumed further back, perhaps
    /// because they are damaged, and must not push out what this run has written. What a roll-back has left behind does not
    /// count either, and goes once its step is reached.
    pub(super) fn surplus(&self, whole: &[Kept], newest: u64, way_back: Option<u64>) -> Vec<u64> {
        let left_behind =
            |one: &Kept| whole.iter().any(|other| other.rollbacks > one.rollbacks && other.step < one.step);
        let (old, mut way): (Vec<Kept>, Vec<Kept>) =
            whole.iter().copied().filter(|one| one.step <= newest).partition(left_behind);
        way.sort_unstable_by_key(|one| std::cmp::Reverse(one.step));
        let back = way_back.map(|step| match way.iter().position(|one| one.step <= step) {
            Some(place) => place.saturating_sub(1)..place + 1,
            None => way.len().saturating_sub(2)..way.len(),
        });
        let mut due = 0;
        let last = |(place, one): (usize, &Kept)| {
            let newer = if one.early { place } else { due };
            due += usize::from(!one.early);
            newer < self.keep_last.max(1)
        };
        let last: Vec<bool> = way.iter().enumerate().map(last).collect();
        let kept = |place: usize| last[place] || back.as_ref().is_some_and(|back| back.contains(&place));
        let surplus = way.iter().enumerate().filter(|(place, _)| !kept(*place)).map(|(_, one)| one);
        let surplus = surplus.chain(&old).map(|one| one.step);
        surplus.filter(|step| self.keep_every.is_none_or(|every| !step.is_multiple_of(every))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(step: u64) -> Kept {
        Kept { step, rollbacks: 0, early: false }
    }

    fn early(step: u64) -> Kept {
        Kept { early: true, ..due(step) }
    }

    fn again(step: u64) -> Kept {
        Kept { rollbacks: 1, ..due(step) }
    }

    fn retention(keep_last: usize, keep_every: Option<u64>) -> Retention {
        Retention { keep_last, keep_every }
    }

    #[test]
    fn keeps_the_last_and_the_multiples() {
        let whole: Vec<Kept> = (1..=10).map(|i| due(i * 100)).collect();
        assert_eq!(retention(2, Some(500)).surplus(&whole, 1000, None), [800, 700, 600, 400, 300, 200, 100]);
        assert_eq!(retention(3, None).surplus(&whole, 1000, None), [700, 600, 500, 400, 300, 200, 100]);
        assert!(Retention::ALL.surplus(&whole, 1000, None).is_empty());
    }

    #[test]
    fn never_deletes_the_newest_nor_counts_later_ones() {
        let one = retention(0, None);
        assert!(one.surplus(&[due(100)], 100, None).is_empty());
        // Resumed at 100 because 300 is damaged; 200 was just written.
        assert_eq!(one.surplus(&[due(100), due(200), due(300)], 200, None), [100]);
    }

    #[test]
    fn what_a_stop_saved_pushes_nothing_out() {
        let whole = [due(100), due(200), early(206), early(226), early(240)];
        assert!(retention(3, None).surplus(&whole, 240, None).is_empty());
        assert_eq!(retention(2, None).surplus(&whole, 240, None), [206]);
        let whole = [&whole[..], &[due(300)]].concat();
        assert_eq!(retention(2, None).surplus(&whole, 300, None), [226, 206, 100]);
        assert!(Retention::ALL.surplus(&whole, 300, None).is_empty());
    }

    #[test]
    fn what_a_roll_back_left_behind_does_not_count_and_goes_once_its_step_is_reached() {
        // 300 and 310 are of the way that was left at 200.
        let whole = [due(100), again(200), due(300), early(310)];
        assert!(retention(2, None).surplus(&whole, 200, None).is_empty());
        let whole = [due(100), again(200), again(300), early(310)];
        assert_eq!(retention(2, None).surplus(&whole, 300, None), [100]);
        let whole = [again(300), early(310), again(400)];
        assert_eq!(retention(2, None).surplus(&whole, 400, None), [310]);
    }

    /// A run that saves every few steps always has a checkpoint that is old enough to go back to, and not much older.
    #[test]
    fn there_is_always_a_way_back() {
        for (every, margin, keep_last) in [(5, 10, 2), (5, 10, 1), (1, 10, 1), (7, 40, 3), (100, 10, 1)] {
            let (mut whole, mut most) = (Vec::new(), 0);
            for step in (every..5000).step_by(every as usize) {
                whole.push(due(step));
                let way_back = step.saturating_sub(margin);
                let surplus = retention(keep_last, None).surplus(&whole, step, Some(way_back));
                whole.retain(|one| !surplus.contains(&one.step));
                most = most.max(whole.len());
                let back = whole.iter().map(|one| one.step).filter(|step| *step <= way_back).max();
                if step >= every + margin {
                    let lag = way_back - back.expect("a way back");
                    assert!(lag < 2 * margin + 2 * every, "every {every}, step {step}: {lag} steps too old");
                }
                assert!(whole.contains(&due(step)));
            }
            assert!(most <= keep_last + 2, "every {every}: {most} checkpoints");
        }
    }

    #[test]
    fn the_way_back_stays_while_trouble_lasts() {
        let mut whole = vec![due(180), due(185), due(190)];
        for step in (195..=260).step_by(5) {
            whole.push(due(step));
            let surplus = retention(2, None).surplus(&whole, step, Some(189));
            whole.retain(|one| !surplus.contains(&one.step));
        }
        assert_eq!(whole, [185, 190, 255, 260].map(due));
    }
}
