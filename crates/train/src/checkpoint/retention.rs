//! Which checkpoints to keep.

/// How many checkpoints stay on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many; 0 means 1, because the newest is never deleted.
    pub keep_last: usize,
    /// Also every checkpoint whose step is a multiple of this.
    pub keep_every: Option<u64>,
}

impl Retention {
    /// Keeps everything.
    pub const ALL: Retention = Retention { keep_last: usize::MAX, keep_every: None };

    /// Steps of `whole` to delete now that the checkpoint of step `newest` is safe on disk.
    ///
    /// Later steps are left alone and do not count: they are from a run that was resumed further back, perhaps
    /// because they are damaged, and must not push out what this run has written.
    pub(super) fn surplus(&self, whole: &[u64], newest: u64) -> Vec<u64> {
        let mut steps: Vec<u64> = whole.iter().copied().filter(|&step| step <= newest).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps
            .into_iter()
            .skip(self.keep_last.max(1))
            .filter(|step| self.keep_every.is_none_or(|every| !step.is_multiple_of(every)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_and_the_multiples() {
        let steps: Vec<u64> = (1..=10).map(|i| i * 100).collect();
        let retention = |keep_last, keep_every| Retention { keep_last, keep_every };
        assert_eq!(retention(2, Some(500)).surplus(&steps, 1000), [800, 700, 600, 400, 300, 200, 100]);
        assert_eq!(retention(3, None).surplus(&steps, 1000), [700, 600, 500, 400, 300, 200, 100]);
        assert!(Retention::ALL.surplus(&steps, 1000).is_empty());
    }

    #[test]
    fn never_deletes_the_newest_nor_counts_later_ones() {
        let retention = Retention { keep_last: 0, keep_every: None };
        assert!(retention.surplus(&[100], 100).is_empty());
        // Resumed at 100 because 300 is damaged; 200 was just written.
        assert_eq!(retention.surplus(&[100, 200, 300], 200), [100]);
    }
}
