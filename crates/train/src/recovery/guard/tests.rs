use super::*;

const POLICY: Policy = Policy {
    enabled: true,
    window: 128,
    loss_threshold: 10.0,
    norm_threshold: 10.0,
    max_skips: 3,
    max_rollbacks: 2,
    margin: 10,
    lr_factor: 0.5,
    clip_factor: 1.0,
    cooldown: None,
    warmup: 200,
    clip: 1.0,
};

/// Noise as training has it: normal, from the sum of twelve even numbers.
struct Noise(u64);

impl Noise {
    fn even(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.even()).sum::<f64>() - 6.0
    }
}

/// Loss and gradient norm of a small OPT: from ln V down along a power law, norms that peak in the warm-up.
fn curve(step: u64, noise: &mut Noise) -> (f64, f64) {
    let t = step as f64;
    // One batch in a hundred is odd: other languages, tables, code.
    let odd = if noise.even() < 0.01 { 4.0 } else { 1.0 };
    let loss = (1.7 + 9.1 * (1.0 + t / 40.0).powf(-0.5)) * (1.0 + 0.015 * odd * noise.normal());
    let warm = (t / 200.0).min(1.0);
    let norm = (0.4 + 6.0 * warm * (-t / 300.0).exp()) * (0.25 * odd.sqrt() * noise.normal()).exp();
    (loss, norm)
}

fn guard() -> Guard {
    Guard::new(POLICY, State::after(0))
}

/// A guard that has accepted steps 1 to `steps`.
fn trained(steps: u64) -> (Guard, Noise) {
    let (mut guard, mut noise) = (guard(), Noise(1));
    for step in 1..=steps {
        let (loss, norm) = curve(step, &mut noise);
        assert_eq!(guard.judge(step, loss, norm), Verdict::Accept, "step {step}");
    }
    (guard, noise)
}

/// Judges bad steps after step `done` until something else than a skip is said.
fn until_trouble(guard: &mut Guard, done: u64, loss: f64) -> Verdict {
    for _ in 0..=POLICY.max_skips {
        match guard.judge(done + 1, loss, 1.0) {
            Verdict::Skip(_) => {}
            verdict => return verdict,
        }
    }
    panic!("more skips than are allowed");
}

#[test]
fn ordinary_noise_and_warm_up_raise_no_alarm() {
    for seed in 0..20 {
        let (mut guard, mut noise) = (guard(), Noise(seed));
        for step in 1..=5000 {
            let (loss, norm) = curve(step, &mut noise);
            let verdict = guard.judge(step, loss, norm);
            assert_eq!(verdict, Verdict::Accept, "seed {seed}, step {step}");
        }
        assert_eq!(guard.batch(), 5000);
    }
}

#[test]
fn losses_that_hardly_differ_may_rise_a_little() {
    let mut guard = guard();
    for step in 1..=300 {
        assert_eq!(guard.judge(step, 2.0, 0.5), Verdict::Accept);
    }
    assert_eq!(guard.judge(301, 2.59, 0.5), Verdict::Accept);
    assert!(matches!(guard.judge(302, 2.61, 0.5), Verdict::Skip(_)));
}

/// A model that knows its text by heart: figures of a real run, which ended with status 3.
#[test]
fn losses_next_to_nothing_and_gradients_that_are_clipped_are_no_trouble() {
    let (mut guard, mut noise) = (guard(), Noise(5));
    for step in 1..=3000 {
        let (mut loss, mut norm) =
            (0.008 * (0.2 * noise.normal()).exp(), 0.08 * (0.2 * noise.normal()).exp());
        match step % 20 {
            7 => (loss, norm) = (0.1561, 1.873),
            13 => (loss, norm) = (0.0249, 4.142),
            _ => {}
        }
        assert_eq!(guard.judge(step, loss, norm), Verdict::Accept, "step {step}");
    }
    for (loss, norm) in [(0.6, 1.0), (0.01, 20.0), (0.2, 4.0)] {
        assert!(matches!(guard.judge(3001, loss, norm), Verdict::Skip(_)), "{loss}, {norm}");
    }
}

#[test]
fn without_a_clip_every_long_gradient_is_trouble() {
    let (mut guard, _) = trained(500);
    guard.policy.clip = 0.0;
    assert!(matches!(guard.judge(501, 3.0, 60.0), Verdict::Skip(_)));
}

#[test]
fn the_way_back_begins_before_the_first_step_of_a_trouble() {
    let (mut guard, mut noise) = trained(1000);
    assert_eq!(guard.way_back(1000), Some(990));
    assert!(matches!(guard.judge(1001, 50.0, 1.0), Verdict::Skip(_)));
    for step in 1001..1100 {
        let (loss, norm) = curve(step, &mut noise);
        assert_eq!(guard.judge(step, loss, norm), Verdict::Accept);
        assert_eq!(guard.way_back(step), Some(990), "the trouble may go on after step {step}");
    }
    let Verdict::RollBack(trouble) = until_trouble(&mut guard, 1099, 50.0) else { panic!() };
    assert_eq!(trouble.trusted, 990);
    guard.roll_back(&trouble, 990, State::after(990));
    assert_eq!(guard.way_back(990), Some(980));
    assert_eq!(guard.way_back(1000), Some(989), "where trouble is back, an older one is wanted");
    assert_eq!(guard.way_back(1500), Some(1490));
    guard.policy.max_rollbacks = 1;
    assert_eq!(guard.way_back(1500), None);
}

#[test]
fn a_spike_is_skipped_and_is_as_if_it_had_never_been() {
    for (loss, norm) in [(9.0, 1.0), (f64::NAN, 1.0), (2.9, f64::INFINITY), (2.9, 500.0)] {
        let (mut guard, mut noise) = trained(500);
        let before = guard.clone();
        let Verdict::Skip(cause) = guard.judge(501, loss, norm) else { panic!("{loss}, {norm}") };
        assert_eq!((cause.step, cause.batch, guard.batch()), (501, 500, 501));
        assert_eq!(cause.not_finite(), !loss.is_finite() || !norm.is_finite());
        assert_eq!((&guard.state.losses, &guard.state.norms), (&before.state.losses, &before.state.norms));
        for step in 501..=800 {
            let (loss, norm) = curve(step, &mut noise);
            assert_eq!(guard.judge(step, loss, norm), Verdict::Accept, "step {step}");
            assert_eq!(guard.batch(), step + 1);
        }
        assert!(guard.state.skips.is_empty(), "it is forgotten behind the window");
    }
}

#[test]
fn spikes_far_apart_never_roll_back_and_norms_in_the_warm_up_are_let_be() {
    let (mut guard, mut noise) = (guard(), Noise(3));
    for step in 1..=5000 {
        if step % 50 == 0 && step >= 100 {
            let verdict = guard.judge(step, 30.0, 1.0);
            assert!(matches!(verdict, Verdict::Skip(_)), "step {step}: {verdict:?}");
        }
        let (loss, norm) = curve(step, &mut noise);
        let norm = if step == 150 { 1e4 } else { norm };
        assert_eq!(guard.judge(step, loss, norm), Verdict::Accept, "step {step}");
    }
    assert_eq!(guard.rollbacks(), 0);
}

#[test]
fn a_divergence_rolls_back_past_what_is_mistrusted() {
    let (mut guard, mut noise) = trained(1000);
    // Up to the double within forty steps, as after an update that broke something.
    let mut verdict = Verdict::Accept;
    let mut step = 1000;
    let mut skipped = 0;
    for t in 1..=40 {
        let (loss, norm) = curve(step + 1, &mut noise);
        verdict = guard.judge(step + 1, loss * (1.0 + f64::from(t) / 40.0), norm * 2.0);
        match verdict {
            Verdict::Accept => step += 1,
            Verdict::Skip(_) => skipped += 1,
            _ => break,
        }
    }
    let Verdict::RollBack(trouble) = verdict else { panic!("{verdict:?}") };
    assert_eq!(skipped, 3);
    assert!((1001..1020).contains(&trouble.first), "{trouble:?}");
    assert_eq!(trouble.trusted, trouble.first - 11);
    let first_batch = trouble.first - 1;
    assert_eq!(trouble.batches.start, first_batch - 10);
    assert_eq!(trouble.batches.end, trouble.cause.batch + 1);

    let then = trained(900).0.state().clone();
    guard.roll_back(&trouble, 900, then);
    assert_eq!((guard.batch(), guard.rollbacks(), guard.factors(901)), (900, 1, (0.5, 1.0)));
    let mut noise = Noise(9);
    let mut step = 900;
    while guard.batch() < trouble.batches.start {
        step += 1;
        let (loss, norm) = curve(step, &mut noise);
        assert_eq!(guard.judge(step, loss, norm), Verdict::Accept);
    }
    assert_eq!(guard.batch(), trouble.batches.end, "what is left out is passed over, in one go");
}

#[test]
fn checkpoints_that_a_roll_back_left_behind_are_known() {
    let (mut guard, _) = trained(1000);
    assert!(guard.went_through(0, 1000) && !guard.went_through(1, 1000));
    let Verdict::RollBack(trouble) = until_trouble(&mut guard, 1000, 50.0) else { panic!() };
    guard.roll_back(&trouble, 900, State::after(900));
    // 950 is of the old way; 900 and before are common; later ones are the new way's own.
    assert!(!guard.went_through(0, 950) && guard.went_through(0, 900) && guard.went_through(1, 950));
    assert!(!guard.went_through(2, 100));
}

#[test]
fn trouble_that_comes_back_goes_further_back_then_gives_up() {
    let (mut guard, _) = trained(1000);
    let Verdict::RollBack(first) = until_trouble(&mut guard, 1000, 50.0) else { panic!() };
    assert_eq!(first.trusted, 990);
    guard.roll_back(&first, 900, trained(900).0.state().clone());
    // At about the same step again: 900 was not old enough.
    for step in 901..=1010 {
        let (loss, norm) = curve(step, &mut Noise(step));
        assert_eq!(guard.judge(step, loss, norm), Verdict::Accept);
    }
    let Verdict::RollBack(second) = until_trouble(&mut guard, 1010, 50.0) else { panic!() };
    assert_eq!(second.trusted, 899);
    guard.roll_back(&second, 800, trained(800).0.state().clone());
    assert_eq!((guard.rollbacks(), guard.factors(801).0), (2, 0.25));
    assert!(matches!(until_trouble(&mut guard, 800, f64::NAN), Verdict::GiveUp(_)));
    // What both roll-backs left out stays left out.
    let out = &guard.state().left_out;
    for batches in [&first.batches, &second.batches] {
        assert!(out.iter().any(|range| range.start <= batches.start && range.end >= batches.end), "{out:?}");
    }
}

#[test]
fn factors_end_with_the_cooldown() {
    let (mut guard, _) = trained(1000);
    guard.policy.cooldown = Some(100);
    guard.policy.clip_factor = 0.3;
    let Verdict::RollBack(trouble) = until_trouble(&mut guard, 1000, 50.0) else { panic!() };
    guard.roll_back(&trouble, 900, State::after(900));
    assert_eq!(guard.factors(901), (0.5, 0.3));
    assert_eq!((guard.factors(1101), guard.factors(1102)), ((0.5, 0.3), (1.0, 1.0)));
    // New trouble behind its end starts from the full rate.
    let later = Trouble { first: 2000, ..trouble };
    guard.roll_back(&later, 1900, State::after(1900));
    assert_eq!(guard.factors(1950), (0.5, 0.3));
}

#[test]
fn switched_off_it_takes_spikes_and_ends_at_what_is_not_finite() {
    let (mut guard, _) = trained(500);
    guard.policy.enabled = false;
    assert_eq!(guard.judge(501, 90.0, 1e9), Verdict::Accept);
    assert!(matches!(guard.judge(502, f64::NAN, 1.0), Verdict::GiveUp(_)));
}

#[test]
fn without_roll_backs_it_gives_up_after_the_skips() {
    let (mut guard, _) = trained(500);
    guard.policy.max_rollbacks = 0;
    assert!(matches!(until_trouble(&mut guard, 500, 50.0), Verdict::GiveUp(_)));
    let (mut guard, _) = trained(500);
    guard.policy.max_skips = 0;
    assert!(matches!(guard.judge(501, 50.0, 1.0), Verdict::RollBack(_)));
}

#[test]
fn a_state_that_was_stored_decides_alike() {
    let mut straight = guard();
    let mut stored = guard();
    let (mut noise, mut step) = (Noise(11), 0);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..3000u64 {
        let (mut loss, norm) = curve(step + 1, &mut noise);
        if (round / 40) % 9 == 5 && round % 3 == 0 {
            loss *= 4.0;
        }
        let verdict = straight.judge(step + 1, loss, norm);
        assert_eq!(verdict, stored.judge(step + 1, loss, norm), "round {round}");
        match &verdict {
            Verdict::Accept => step += 1,
            Verdict::Skip(_) => drop(seen.insert("skip")),
            Verdict::GiveUp(_) => drop(seen.insert("give up")),
            Verdict::RollBack(trouble) => {
                seen.insert("roll back");
                step = trouble.trusted;
                straight.roll_back(trouble, step, State::after(step));
                stored.roll_back(trouble, step, State::after(step));
            }
        }
        let text = serde_json::to_string(stored.state()).unwrap();
        stored = Guard::new(POLICY, serde_json::from_str(&text).unwrap());
        assert_eq!(stored.state(), straight.state());
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
}

#[test]
fn what_a_step_was_tried_with_in_vain_is_remembered() {
    let (mut guard, mut noise) = trained(500);
    for _ in 0..2 {
        assert!(matches!(guard.judge(501, 50.0, 1.0), Verdict::Skip(_)));
    }
    assert_eq!(guard.state().skipped(501), [500, 501]);
    let (loss, norm) = curve(501, &mut noise);
    assert_eq!(guard.judge(501, loss, norm), Verdict::Accept);
    assert!(guard.state().skipped(502).is_empty());
    // A roll-back tells anew.
    let Verdict::RollBack(trouble) = until_trouble(&mut guard, 501, 50.0) else { panic!() };
    guard.roll_back(&trouble, 490, State::after(490));
    assert!((490..510).all(|step| guard.state().skipped(step).is_empty()));
}
