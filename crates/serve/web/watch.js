// How the server does: its metrics, read every second while somebody looks, as points of curves.
import { getText } from "./api.js";
import { buckets, grown, parse, quantile, rate, total } from "./prometheus.js";
import { Store } from "./store.js";

/** Between two readings, in milliseconds. */
const PERIOD = 1000;
/** Points that are kept: five minutes. */
const KEPT = 300;
/** Rates and quantiles are those of so many readings, or they would jump about. */
const SPAN = 5;
/** Without a reading for so long, in seconds, curves have a gap. */
const GAP = 4;

/** `points` are newest last; `lost` is why the last reading failed, if it did. */
export const watch = new Store({ points: [], ready: new Map(), lost: null });

let readings = [];
let timer = null;

/** Begins to read; returns what ends it. */
export function look() {
    let looking = true;
    const next = async () => {
        if (!document.hidden) await read();
        if (looking) timer = setTimeout(next, PERIOD);
    };
    next();
    return () => {
        looking = false;
        clearTimeout(timer);
    };
}

async function read() {
    let samples;
    try {
        samples = parse(await getText("/metrics"));
    } catch (error) {
        watch.set({ lost: error });
        return;
    }
    const reading = { at: Date.now() / 1000, samples };
    const last = readings.at(-1);
    if (last && reading.at - last.at > GAP) {
        readings = [];
        push({ at: (last.at + reading.at) / 2 });
    }
    readings = [...readings.slice(-SPAN), reading];
    const ready = new Map(
        (samples.get("ferropt_model_ready") ?? []).map(({ labels, value }) => [labels.model, value === 1]),
    );
    watch.set({ ready, lost: null });
    push(point(readings[0], reading));
}

const push = (one) => watch.set({ points: [...watch.value.points, one].slice(-KEPT) });

/** Routes that generate. The others are asked by those who watch, among them this page. */
const TEXTS = /completions|generate/;

/** What is shown for the time between two readings. */
export function point(before, after) {
    const seconds = after.at - before.at;
    const growth = (name, pass) =>
        rate(total(before.samples, name, pass) ?? 0, total(after.samples, name, pass) ?? 0, seconds);
    const times = (name) => grown(buckets(before.samples, name), buckets(after.samples, name));
    const [first, between] = [
        times("ferropt_time_to_first_token_seconds"),
        times("ferropt_inter_token_seconds"),
    ];
    const now = (name) => total(after.samples, name);
    const pages = now("ferropt_cache_pages");
    return {
        at: after.at,
        generated: growth("ferropt_generated_tokens_total"),
        prompt: growth("ferropt_prompt_tokens_total"),
        first50: quantile(0.5, first),
        first95: quantile(0.95, first),
        between50: quantile(0.5, between),
        between95: quantile(0.95, between),
        waiting: now("ferropt_queue_length"),
        running: now("ferropt_running"),
        cache: pages ? (100 * now("ferropt_cache_pages_used")) / pages : null,
        answers: growth("ferropt_requests_total", ({ route }) => TEXTS.test(route)),
        refusals: growth("ferropt_refusals_total"),
    };
}
