//! Line charts as SVG.

use super::record::Record;
use std::fmt::Write;

const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 500.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 58.0;

/// Okabe and Ito's palette (2008), which people with any colour vision can tell apart; blue is for training.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// How values are laid out along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Evenly.
    Linear,
    /// By their logarithm; values not above 0 are left out.
    Log,
}

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A line.
    Line,
    /// A line with a dot at every point, for few points.
    Dots,
    /// A pale line without an entry in the legend, for the noise behind a smoothed line of the same colour.
    Faint,
}

/// One curve.
#[derive(Clone, Debug)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Points (x, y) in order of x. Values that are not finite leave a gap.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub style: Style,
    /// Index of its colour; curves that belong together share one.
    pub colour: usize,
}

/// A chart.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Above the chart.
    pub title: String,
    /// Below the horizontal axis.
    pub x_label: String,
    /// Beside the vertical axis.
    pub y_label: String,
    /// Horizontal layout.
    pub x_scale: Scale,
    /// Vertical layout.
    pub y_scale: Scale,
    /// Curves, drawn in this order.
    pub series: Vec<Series>,
}

/// Loss by step: training, as it is and smoothed, and every validation set.
pub fn loss_curves(records: &[Record], title: &str) -> Plot {
    let mut training = Vec::new();
    let mut sets: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for record in records {
        match record {
            Record::Training(t) => training.push((t.step as f64, t.loss)),
            // Its loss is none of the run's, and may be beyond any scale.
            Record::Skipped(_) => {}
            Record::Validation(v) => {
                let point = (v.step as f64, v.loss);
                match sets.iter_mut().find(|(name, _)| *name == v.set) {
                    Some((_, points)) => points.push(point),
                    None => sets.push((v.set.clone(), vec![point])),
                }
            }
        }
    }
    let last =
        |points: &[(f64, f64)]| points.last().map_or(String::new(), |point| format!(" {:.3}", point.1));
    let smooth = smoothed(&training);
    let name = format!("training{}", last(&smooth));
    let mut series = vec![
        Series { name: String::new(), points: training, style: Style::Faint, colour: 0 },
        Series { name, points: smooth, style: Style::Line, colour: 0 },
    ];
    for (index, (set, points)) in sets.into_iter().enumerate() {
        let name = format!("validation, {set}{}", last(&points));
        series.push(Series { name, points, style: Style::Dots, colour: index + 1 });
    }
    Plot {
        title: title.into(),
        x_label: "step".into(),
        y_label: "loss (nats per token)".into(),
        x_scale: Scale::Linear,
        y_scale: Scale::Linear,
        series,
    }
}

/// Mean of the neighbours on both sides, over a fiftieth of the run; over fewer at the start, where the curve is so
/// steep that they would pull it up.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    let mean = |place: usize| {
        let reach = (finite.len() / 100).min(place / 4);
        let window = &finite[place - reach..(place + reach + 1).min(finite.len())];
        window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64
    };
    (0..finite.len()).map(|place| (finite[place].0, mean(place))).collect()
}

/// One direction of the chart: values to pixels.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// Covers `values`. With `round` there is room around them, up to whole ticks on a linear scale; without, only 0 is
    /// added where it is near.
    fn new(
        scale: Scale,
        values: impl Iterator<Item = f64>,
        from: f64,
        to: f64,
        ticks: usize,
        round: bool,
    ) -> Axis {
        let usable = values.filter(|&v| v.is_finite() && (scale == Scale::Linear || v > 0.0));
        let (mut low, mut high) =
            usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            (low, high) = (1.0, 10.0); // nothing to show; an empty frame still needs numbers
        }
        let mut axis = Axis { scale, low, high, from, to, ticks: Vec::new() };
        if low == high {
            let margin = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            (axis.low, axis.high) = (low - margin, high + margin);
        }
        if scale == Scale::Linear && !round && axis.low > 0.0 && axis.low < 0.1 * axis.high {
            axis.low = 0.0;
        }
        match scale {
            Scale::Linear => axis.linear_ticks(ticks, round),
            Scale::Log => axis.log_ticks(ticks, round),
        }
        axis
    }

    fn linear_ticks(&mut self, count: usize, round: bool) {
        let step = nice((self.high - self.low) / count as f64);
        if round {
            (self.low, self.high) = ((self.low / step).floor() * step, (self.high / step).ceil() * step);
        }
        let first = (self.low / step - 1e-9).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        self.ticks = (first..=last).map(|i| i as f64 * step).collect();
    }

    /// Powers of ten, and as many values between them as there is room for.
    fn log_ticks(&mut self, count: usize, round: bool) {
        const BETWEEN: [&[f64]; 3] =
            [&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], &[1.0, 2.0, 5.0], &[1.0]];
        if round {
            (self.low, self.high) = (self.low / 1.04, self.high * 1.04);
        }
        let (low, high) = (self.low * (1.0 - 1e-9), self.high * (1.0 + 1e-9));
        let exponents = low.log10().floor() as i32..=high.log10().ceil() as i32;
        for between in BETWEEN {
            let all = exponents.clone().flat_map(|e| between.iter().map(move |f| f * 10f64.powi(e)));
            self.ticks = all.filter(|tick| (low..=high).contains(tick)).collect();
            if self.ticks.len() <= count + 2 {
                break;
            }
        }
    }

    /// Pixel of a value, if it has one.
    fn place(&self, value: f64) -> Option<f64> {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        share.is_finite().then_some(self.from + share * (self.to - self.from))
    }

    /// Text of a tick, with the decimals that tell it from its neighbours.
    fn text(&self, tick: f64) -> String {
        let step = match (self.scale, &self.ticks[..]) {
            (Scale::Linear, [first, second, ..]) => second - first,
            _ => tick.abs(),
        };
        let size = match self.scale {
            Scale::Linear => self.ticks.iter().fold(0f64, |most, tick| most.max(tick.abs())),
            Scale::Log => tick.abs(),
        };
        let (unit, suffix) = match size {
            s if s >= 1e13 => return format!("{tick:.0e}"),
            s if s >= 1e10 => (1e9, "G"),
            s if s >= 1e7 => (1e6, "M"),
            s if s >= 1e4 => (1e3, "k"),
            _ => (1.0, ""),
        };
        let (step, value) = (step / unit, tick / unit);
        // Enough decimals for the step itself: 0.25 needs 2, 0.5 needs 1.
        let decimals = (0..9).find(|&d| (step * 10f64.powi(d) - (step * 10f64.powi(d)).round()).abs() < 1e-6);
        let suffix = if value == 0.0 { "" } else { suffix };
        format!("{value:.*}{suffix}", decimals.unwrap_or(9) as usize)
    }
}

/// The next larger of 1, 2, 2.5 and 5 times a power of ten.
fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0].into_iter().find(|f| f * power >= step * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

impl Plot {
    /// The chart as an SVG document.
    pub fn to_svg(&self) -> String {
        let points = || self.series.iter().flat_map(|series| series.points.iter().copied());
        let x = Axis::new(self.x_scale, points().map(|p| p.0), LEFT, WIDTH - RIGHT, 8, false);
        let y = Axis::new(self.y_scale, points().map(|p| p.1), HEIGHT - BOTTOM, TOP, 6, true);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" font-family=\"system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif\" \
             font-size=\"13\" fill=\"#333\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
        );
        self.frame(&mut svg, &x, &y);
        for series in &self.series {
            curve(&mut svg, series, &x, &y);
        }
        self.legend(&mut svg);
        svg.push_str("</svg>\n");
        svg
    }

    /// Title, grid, axes and their labels.
    fn frame(&self, svg: &mut String, x: &Axis, y: &Axis) {
        let (right, bottom, middle) = (WIDTH - RIGHT, HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2.0);
        text(svg, LEFT, 30.0, "font-size=\"17\" font-weight=\"600\" fill=\"#111\"", &self.title);
        for &tick in &y.ticks {
            let Some(at) = y.place(tick) else { continue };
            line(svg, (LEFT, at), (right, at), "#e6e6e6");
            text(svg, LEFT - 9.0, at + 4.5, "text-anchor=\"end\"", &y.text(tick));
        }
        for &tick in &x.ticks {
            let Some(at) = x.place(tick) else { continue };
            line(svg, (at, bottom), (at, bottom + 5.0), "#888");
            text(svg, at, bottom + 20.0, "text-anchor=\"middle\"", &x.text(tick));
        }
        line(svg, (LEFT, bottom), (right, bottom), "#888");
        line(svg, (LEFT, TOP), (LEFT, bottom), "#888");
        text(svg, middle, HEIGHT - 14.0, "text-anchor=\"middle\"", &self.x_label);
        let up = (TOP + bottom) / 2.0;
        let turned = format!("text-anchor=\"middle\" transform=\"rotate(-90 20 {up})\"");
        text(svg, 20.0, up, &turned, &self.y_label);
    }

    /// Names and colours, at the top right, where falling curves leave room.
    fn legend(&self, svg: &mut String) {
        let entries: Vec<&Series> =
            self.series.iter().filter(|series| series.style != Style::Faint).collect();
        let longest = entries.iter().map(|series| series.name.chars().count()).max().unwrap_or(0) as f64;
        let (width, height) = (longest * 7.6 + 52.0, entries.len() as f64 * 21.0 + 12.0);
        let left = WIDTH - RIGHT - width - 8.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{left:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"{height}\" rx=\"4\" fill=\"#fff\" \
             fill-opacity=\"0.9\" stroke=\"#ddd\"/>",
            TOP + 4.0
        );
        for (row, series) in entries.into_iter().enumerate() {
            let (at, colour) = (TOP + 20.5 + row as f64 * 21.0, colour(series));
            let _ = writeln!(
                svg,
                "<path d=\"M{:.1} {at:.1}h24\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                left + 10.0
            );
            if series.style == Style::Dots {
                dot(svg, left + 22.0, at, colour);
            }
            text(svg, left + 42.0, at + 4.5, "", &series.name);
        }
    }
}

fn colour(series: &Series) -> &'static str {
    COLOURS[series.colour % COLOURS.len()]
}

/// Draws a series.
fn curve(svg: &mut String, series: &Series, x: &Axis, y: &Axis) {
    let colour = colour(series);
    let look = match series.style {
        Style::Faint => "stroke-width=\"1\" stroke-opacity=\"0.28\"",
        Style::Line | Style::Dots => "stroke-width=\"2\"",
    };
    let places = series.points.iter().map(|&(px, py)| x.place(px).zip(y.place(py)));
    let places: Vec<Option<(f64, f64)>> = places.collect();
    let _ = writeln!(
        svg,
        "<path d=\"{}\" fill=\"none\" stroke=\"{colour}\" {look} stroke-linejoin=\"round\" \
         stroke-linecap=\"round\"/>",
        path(&places)
    );
    let alone = places.iter().flatten().count() == 1; // a line of one point cannot be seen
    if series.style == Style::Dots || (series.style == Style::Line && alone) {
        for &(px, py) in places.iter().flatten() {
            dot(svg, px, py, colour);
        }
    }
}

/// A line through places, with a gap at every `None`. Of places in the same half pixel column only the range and the
/// last are drawn, so that a path is no longer than the picture is wide.
fn path(places: &[Option<(f64, f64)>]) -> String {
    let mut path = String::new();
    let mut rest = places;
    let mut pen = 'M';
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        let &Some((px, start)) = first else {
            pen = 'M';
            continue;
        };
        let _ = write!(path, "{pen}{px:.1} {start:.1}");
        pen = 'L';
        let (mut low, mut high, mut last) = (start, start, start);
        while let Some((&Some((_, py)), after)) =
            rest.split_first().filter(|(p, _)| p.is_some_and(|p| p.0 < px + 0.5))
        {
            (low, high, last) = (low.min(py), high.max(py), py);
            rest = after;
        }
        for (there, here) in [(low, start), (high, low), (last, high)] {
            if there != here {
                let _ = write!(path, "V{there:.1}");
            }
        }
    }
    path
}

fn dot(svg: &mut String, x: f64, y: f64, colour: &str) {
    let _ =
        writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\" stroke=\"#fff\"/>");
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let _ = writeln!(
        svg,
        "<path d=\"M{:.1} {:.1}L{:.1} {:.1}\" stroke=\"{colour}\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn text(svg: &mut String, x: f64, y: f64, look: &str, text: &str) {
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // XML has no way to write most control characters.
    let escaped: String = escaped.chars().filter(|c| !c.is_control()).collect();
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {look}>{escaped}</text>");
}

#[cfg(test)]
mod tests {
    use super::super::record::{Training, Validation};
    use super::*;

    fn example(steps: u64) -> Plot {
        let mut records = Vec::new();
        for step in 1..=steps {
            let noise = (step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / 2f64.powi(24) - 0.5;
            let loss = 3.1 + 7.6 * (-(step as f64) * 6.0 / steps as f64).exp() + 0.5 * noise;
            records.push(Record::Training(Training { step, loss, ..Training::default() }));
            if step % (steps / 12).max(1) == 0 {
                for (set, gap) in [("books <new>", 0.15), ("code & docs", 0.4)] {
                    let set = set.to_string();
                    let loss = loss + gap - 0.5 * noise;
                    records.push(Record::Validation(Validation { step, set, loss, ..Validation::default() }));
                }
            }
        }
        loss_curves(&records, "opt-quick: loss")
    }

    /// Every element that opens also closes, and text is escaped.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        for tag in svg.split('<').skip(1) {
            let (tag, after) = tag.split_once('>').expect("a tag that ends");
            assert!(!after.contains('>'), "{after}");
            let name = tag.trim_start_matches('/').split(' ').next().unwrap();
            match (tag.starts_with('/'), tag.ends_with('/')) {
                (true, _) => assert_eq!(open.pop(), Some(name)),
                (false, false) => open.push(name),
                (false, true) => {}
            }
        }
        assert!(open.is_empty(), "{open:?}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn shows_every_curve_axis_and_name() {
        let svg = example(600).to_svg();
        assert_well_formed(&svg);
        for part in [
            "opt-quick: loss",
            "step",
            "loss (nats per token)",
            "training ",
            "books &lt;new&gt;",
            "code &amp; docs",
        ] {
            assert!(svg.contains(part), "{part}");
        }
        assert_eq!(svg.matches("<circle").count(), 2 * 12 + 2);
        // Set FERROPT_TEST_PLOT to a file to look at the picture.
        if let Ok(path) = std::env::var("FERROPT_TEST_PLOT") {
            std::fs::write(path, svg).unwrap();
        }
    }

    #[test]
    fn stays_small_for_long_runs() {
        let svg = example(200_000).to_svg();
        assert_well_formed(&svg);
        assert!(svg.len() < 300_000, "{} bytes", svg.len());
    }

    #[test]
    fn survives_nothing_one_point_and_nan() {
        for points in [
            vec![],
            vec![(1.0, 2.0)],
            vec![(1.0, f64::NAN), (2.0, f64::INFINITY)],
            vec![(0.0, 0.0), (1.0, 0.0)],
        ] {
            for scale in [Scale::Linear, Scale::Log] {
                let series =
                    Series { name: "a".into(), points: points.clone(), style: Style::Line, colour: 99 };
                let (title, x_label, y_label) = ("t\u{1}".into(), "x".into(), "y".into());
                assert_well_formed(
                    &Plot { title, x_label, y_label, x_scale: scale, y_scale: scale, series: vec![series] }
                        .to_svg(),
                );
            }
        }
        assert_well_formed(&loss_curves(&[], "empty").to_svg());
    }

    #[test]
    fn a_gap_where_the_loss_is_not_finite() {
        let places = [Some((0.0, 1.0)), Some((1.0, 2.0)), None, Some((3.0, 2.0)), Some((4.0, 1.0))];
        assert_eq!(path(&places), "M0.0 1.0L1.0 2.0M3.0 2.0L4.0 1.0");
    }

    #[test]
    fn a_dense_column_is_drawn_over_its_range() {
        let places = [(0.0, 1.0), (0.1, 3.0), (0.2, 0.5), (0.3, 2.0), (4.0, 1.0)].map(Some);
        assert_eq!(path(&places), "M0.0 1.0V0.5V3.0V2.0L4.0 1.0");
    }

    #[test]
    fn ticks_are_round_and_readable() {
        let texts = |scale, low, high, round| {
            let axis = Axis::new(scale, [low, high].into_iter(), 0.0, 1.0, 6, round);
            axis.ticks.iter().map(|&tick| axis.text(tick)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(texts(Scale::Linear, 2.9, 10.8, true), "2 4 6 8 10 12");
        assert_eq!(texts(Scale::Linear, 3.01, 3.69, true), "3.0 3.2 3.4 3.6 3.8");
        assert_eq!(texts(Scale::Linear, 1.0, 100_000.0, false), "0 20k 40k 60k 80k 100k");
        assert_eq!(texts(Scale::Linear, -1.0, 1.0, true), "-1.0 -0.5 0.0 0.5 1.0");
        assert_eq!(texts(Scale::Log, 2.2, 10.8, true), "3 4 5 6 7 8 9 10");
        assert_eq!(texts(Scale::Log, 0.01, 100_000.0, true), "0.01 0.1 1 10 100 1000 10k 100k");
    }

    #[test]
    fn smoothing_takes_out_noise_and_keeps_the_start() {
        let noisy: Vec<(f64, f64)> =
            (0..1000).map(|i| (i as f64, 5.0 + if i % 2 == 0 { 0.5 } else { -0.5 })).collect();
        let smooth = smoothed(&noisy);
        assert_eq!(smooth[0], noisy[0]);
        assert!(smooth[20..].iter().all(|point| (point.1 - 5.0).abs() < 0.05));
        assert_eq!(smoothed(&[(1.0, f64::NAN), (2.0, 5.0)]), [(2.0, 5.0)]);
    }
}
