use ferropt_device::{Device, Draw, Drawer};

use crate::*;

/// Rows of logits that make each part of the definition matter: ordinary ones, equal ones, one that towers above all others,
/// and what a broken model gives.
fn rows(width: usize) -> Vec<Vec<f32>> {
    let ordinary = numbers::<f32>(1, width, 3.0);
    let equal = ordinary.iter().map(|x| x.round()).collect();
    let flat = ordinary.iter().map(|x| x * 0.01).collect();
    let mut alone = vec![-40.0; width];
    alone[width / 2] = 60.0;
    let mut broken = ordinary.clone();
    (broken[0], broken[width - 1]) = (f32::NAN, f32::NEG_INFINITY);
    let mut infinite = broken.clone();
    infinite[width / 3] = f32::INFINITY;
    vec![ordinary, equal, flat, alone, broken, infinite, vec![f32::NAN; width]]
}

fn ways() -> Vec<Draw> {
    let plain = Draw {
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        without: None,
        seed: 0x1234_5678_9abc,
        choice: 3,
        place: 11,
    };
    let mut ways = vec![
        plain,
        Draw { place: 1 << 40, ..plain },
        Draw { temperature: 0.3, without: Some(2), ..plain },
        Draw { top_k: Some(1), ..plain },
        Draw { top_k: Some(40), top_p: 0.6, temperature: 1.7, ..plain },
        Draw { top_k: Some(1_000_000), min_p: 0.2, ..plain },
        Draw { top_p: 1e-9, ..plain },
        Draw { top_p: 0.5, min_p: 0.01, without: Some(0), ..plain },
        Draw { temperature: 1e-30, top_p: 0.99, ..plain },
    ];
    ways.extend((0..5).map(|place| Draw { top_p: 0.95, seed: 7, place, ..plain }));
    ways
}

#[test]
fn tokens_are_those_that_the_definition_chooses() {
    let mut drawer = Drawer::default();
    // Fewer columns are known than there are.
    for (width, known) in [(1, 1), (5, 4), (64, 64), (1003, 999)] {
        let rows = rows(width);
        let draws: Vec<(usize, Draw)> =
            (0..rows.len()).flat_map(|row| ways().into_iter().map(move |draw| (row, draw))).collect();
        let want: Vec<f32> =
            draws.iter().map(|(row, draw)| drawer.draw(draw, &rows[*row][..known]) as f32).collect();
        for (name, got) in on_every_device(|device| {
            let logits = put(device, &rows.concat());
            assert!(device.draw(width, known, &logits, &[]).is_empty());
            vec![device.draw(width, known, &logits, &draws).into_iter().map(|id| id as f32).collect()]
        }) {
            for ((got, want), draw) in got[0].iter().zip(&want).zip(&draws) {
                assert_eq!(got, want, "{name}, {known} of {width}: {draw:?}");
            }
        }
    }
}

/// A whole vocabulary.
#[test]
fn as_many_tokens_as_opt_has_are_chosen_from_alike() {
    let (width, mut drawer) = (50_272, Drawer::default());
    let logits = numbers::<f32>(3, width, 2.5);
    let draws: Vec<(usize, Draw)> = ways().into_iter().map(|draw| (0, draw)).collect();
    let want: Vec<f32> = draws.iter().map(|(_, draw)| drawer.draw(draw, &logits[..50_265]) as f32).collect();
    for (name, got) in on_every_device(|device| {
        let ids = device.draw(width, 50_265, &put(device, &logits), &draws);
        vec![ids.into_iter().map(|id| id as f32).collect()]
    }) {
        assert_eq!(got[0], want, "{name}");
    }
}
