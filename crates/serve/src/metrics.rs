//! What Prometheus reads.

use crate::models::{Models, State};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::Ordering;

/// Names and values.
type Labels = Vec<(&'static str, String)>;
pub(crate) type Counters = Family<Labels, Counter>;
type Gauges = Family<Labels, Gauge>;
type Histograms = Family<Labels, Histogram, Buckets>;

/// Upper bounds in seconds.
#[derive(Clone, Copy)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

/// From a step of a small model to a long wait.
const WAITS: Buckets = Buckets(&[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
]);
/// Between two tokens.
const STEPS: Buckets = Buckets(&[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0,
]);

/// All metrics of a server.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Counters,
    refusals: Counters,
    seconds: Histograms,
    first_token: Histograms,
    between_tokens: Histograms,
    queued: Histograms,
    prompt_tokens: Counters,
    generated_tokens: Counters,
    cancelled: Counters,
    ready: Gauges,
    waiting: Gauges,
    running: Gauges,
    pages: Gauges,
    total_pages: Gauges,
    reused: Counters,
    preemptions: Counters,
    drafted: Counters,
    accepted: Counters,
    in_flight: Gauge,
    handshakes: Counter,
    /// Connections beyond what one address may have.
    pub(crate) excess_connections: Counter,
    /// Bytes taken by bodies that are being received and read.
    pub(crate) body_memory: Gauge,
    /// Bytes of answers that were not taken in.
    pub(crate) answer_memory: Gauge,
    /// Connections that were closed because an answer was not taken in.
    pub(crate) slow_clients: Counters,
}

/// Those of one model, to be counted without looking anything up.
#[derive(Clone)]
pub(crate) struct ModelMetrics {
    /// Seconds from a request's arrival to the first token of all its texts, of which none is compared with others.
    pub(crate) first_token: Histogram,
    /// Seconds from one token of a text to the next.
    pub(crate) between_tokens: Histogram,
    /// Seconds in the queue.
    pub(crate) queued: Histogram,
    pub(crate) prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    /// Requests that were given up before their end.
    pub(crate) cancelled: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        let mut registry = Registry::with_prefix("ferropt");
        let counters = |registry: &mut Registry, name: &str, help: &str| {
            let family = Counters::default();
            registry.register(name, help, family.clone());
            family
        };
        let gauges = |registry: &mut Registry, name: &str, help: &str| {
            let family = Gauges::default();
            registry.register(name, help, family.clone());
            family
        };
        let histograms = |registry: &mut Registry, name: &str, help: &str, buckets| {
            let family = Histograms::new_with_constructor(buckets);
            registry.register_with_unit(name, help, Unit::Seconds, family.clone());
            family
        };
        let r = &mut registry;
        let (in_flight, handshakes) = (Gauge::default(), Counter::default());
        let excess_connections = Counter::default();
        r.register(
            "requests_in_flight",
            "Requests whose answers were not taken in completely",
            in_flight.clone(),
        );
        r.register("tls_failures", "TLS handshakes that failed or took too long", handshakes.clone());
        let help = "Connections beyond what one address may have";
        r.register("excess_connections", help, excess_connections.clone());
        let memory = |registry: &mut Registry, name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
            gauge
        };
        Metrics {
            requests: counters(r, "requests", "Answers, by route and status"),
            refusals: counters(r, "refusals", "Requests that were refused or failed, by the error's code"),
            seconds: histograms(r, "request", "From a request to the end of its answer, by route", WAITS),
            first_token: histograms(
                r,
                "time_to_first_token",
                "From a request to its first token, unless texts are compared first",
                WAITS,
            ),
            between_tokens: histograms(r, "inter_token", "From one token of a text to the next", STEPS),
            queued: histograms(r, "queue", "Waiting for a turn", WAITS),
            prompt_tokens: counters(r, "prompt_tokens", "Tokens of prompts"),
            generated_tokens: counters(r, "generated_tokens", "Tokens generated"),
            cancelled: counters(r, "cancelled", "Requests that were given up before their end"),
            ready: gauges(r, "model_ready", "Whether the model can be used"),
            waiting: gauges(r, "queue_length", "Texts that wait for a turn"),
            running: gauges(r, "running", "Texts that are being computed"),
            pages: gauges(r, "cache_pages_used", "Pages of the cache in use"),
            total_pages: gauges(r, "cache_pages", "Pages of the cache"),
            reused: counters(r, "reused_tokens", "Tokens of prompts that an earlier text had"),
            preemptions: counters(r, "preemptions", "Times that a text lost its place in the cache"),
            drafted: counters(r, "draft_tokens", "Tokens that the draft guessed"),
            accepted: counters(
                r,
                "draft_accepted_tokens",
                "Tokens that the draft guessed and that were right",
            ),
            in_flight,
            handshakes,
            excess_connections,
            body_memory: memory(
                r,
                "body_memory",
                "Memory of the bodies of requests that are being received and read",
            ),
            answer_memory: memory(r, "answer_memory", "Memory of answers that clients have not taken in"),
            slow_clients: counters(
                r,
                "slow_clients",
                "Connections that were closed because an answer was not taken in, by what was short",
            ),
            registry,
        }
    }

    /// Those of one model.
    pub(crate) fn of_model(&self, name: &str) -> ModelMetrics {
        let labels = model(name);
        ModelMetrics {
            first_token: self.first_token.get_or_create(&labels).clone(),
            between_tokens: self.between_tokens.get_or_create(&labels).clone(),
            queued: self.queued.get_or_create(&labels).clone(),
            prompt_tokens: self.prompt_tokens.get_or_create(&labels).clone(),
            generated_tokens: self.generated_tokens.get_or_create(&labels).clone(),
            cancelled: self.cancelled.get_or_create(&labels).clone(),
        }
    }

    /// Counts an answer; `code` is that of its error.
    pub(crate) fn answered(&self, route: &str, status: u16, seconds: f64, code: Option<&str>) {
        let route = ("route", route.to_string());
        self.seconds.get_or_create(&vec![route.clone()]).observe(seconds);
        self.requests.get_or_create(&vec![route, ("status", status.to_string())]).inc();
        if let Some(code) = code {
            self.refusals.get_or_create(&vec![("code", code.to_string())]).inc();
        }
    }

    /// Counts a connection that came to nothing.
    pub(crate) fn handshake_failed(&self) {
        self.handshakes.inc();
    }

    /// All of them as text.
    pub(crate) fn text(&self, models: &Models, in_flight: usize) -> String {
        self.in_flight.set(in_flight as i64);
        for (name, state) in models.states() {
            let labels = model(name);
            let State::Ready(live) = state else {
                for gauge in [&self.ready, &self.waiting, &self.running, &self.pages, &self.total_pages] {
                    gauge.get_or_create(&labels).set(0);
                }
                continue;
            };
            let load = live.engine.load();
            self.ready.get_or_create(&labels).set(1);
            self.waiting.get_or_create(&labels).set(live.gate.waiting() as i64);
            self.running.get_or_create(&labels).set((load.running + load.waiting) as i64);
            self.pages.get_or_create(&labels).set(load.pages as i64);
            self.total_pages.get_or_create(&labels).set(load.total_pages as i64);
            // The engine counts these itself.
            for (counters, count) in [
                (&self.reused, load.reused_tokens),
                (&self.preemptions, load.preemptions),
                (&self.drafted, load.drafted_tokens),
                (&self.accepted, load.accepted_tokens),
            ] {
                counters.get_or_create(&labels).inner().store(count, Ordering::Relaxed);
            }
        }
        let mut text = String::new();
        // A String takes everything.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// The name is whatever the operator likes; the encoder takes values as they are.
fn model(name: &str) -> Labels {
    vec![("model", name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))]
}

/// The format of OpenMetrics as Prometheus' older one, in which counters have their whole name, and nothing is said of units.
pub(crate) fn older(text: &str) -> String {
    let is_counter = |line: &&str| line.starts_with("# TYPE ") && line.ends_with(" counter");
    let counters: Vec<&str> =
        text.lines().filter(is_counter).filter_map(|line| line.split(' ').nth(2)).collect();
    let mut older = String::with_capacity(text.len());
    for line in text.lines().filter(|line| !line.starts_with("# UNIT ") && *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(&name) => {
                older += &format!("# {what} {name}_total {rest}");
            }
            _ => older += line,
        }
        older.push('\n');
    }
    older
}

#[cfg(test)]
mod tests {
    use super::{Metrics, model, older};
    use crate::models::{Models, State};

    #[test]
    fn a_model_that_failed_has_nothing_to_do_any_more() {
        let (metrics, labels) = (Metrics::new(), model("a"));
        let gauges = [&metrics.waiting, &metrics.running, &metrics.pages, &metrics.total_pages];
        gauges.iter().for_each(|gauge| {
            gauge.get_or_create(&labels).set(7);
        });
        let models = Models::new(vec!["a".into()], vec![]).unwrap();
        models.set("a", State::Failed("its engine has ended".into()));
        let text = metrics.text(&models, 0);
        for name in ["model_ready", "queue_length", "running", "cache_pages_used", "cache_pages"] {
            assert!(text.contains(&format!("ferropt_{name}{{model=\"a\"}} 0\n")), "{name}: {text}");
        }
    }

    #[test]
    fn names_are_written_so_that_they_end_where_they_end() {
        assert_eq!(model("a\"b\\c\nd")[0].1, "a\\\"b\\\\c\\nd");
    }

    #[test]
    fn the_older_format_has_the_same_numbers() {
        let text = "# HELP a_queue Waits.\n# TYPE a_queue histogram\n# UNIT a_queue_seconds seconds\na_queue_sum 0.5\n\
            # HELP a_requests All of a_requests.\n# TYPE a_requests counter\na_requests_total{b=\"# c\"} 3\n# EOF\n";
        let want = "# HELP a_queue Waits.\n# TYPE a_queue histogram\na_queue_sum 0.5\n\
            # HELP a_requests_total All of a_requests.\n# TYPE a_requests_total counter\na_requests_total{b=\"# c\"} 3\n";
        assert_eq!(older(text), want);
    }
}
