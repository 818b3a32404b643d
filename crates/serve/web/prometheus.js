// Prometheus' text format, and what is computed from its counters and histograms.

/** Samples of a page of metrics: a map from names to lists of `{ labels, value }`. Lines that are no samples are left out. */
export function parse(text) {
    const samples = new Map();
    for (const line of text.split("\n")) {
        const sample = parseLine(line.trim());
        if (!sample) continue;
        if (!samples.has(sample.name)) samples.set(sample.name, []);
        samples.get(sample.name).push({ labels: sample.labels, value: sample.value });
    }
    return samples;
}

const NAME = /[a-zA-Z_:][a-zA-Z0-9_:]*/y;
const LABEL = /\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?/y;
const VALUE = /\s*(\S+)/y;

function parseLine(line) {
    if (!line || line.startsWith("#")) return null;
    const match = (pattern, from) => {
        pattern.lastIndex = from;
        return pattern.exec(line);
    };
    const name = match(NAME, 0);
    if (!name) return null;
    let at = NAME.lastIndex;
    const labels = {};
    if (line[at] === "{") {
        at += 1;
        for (let label; (label = match(LABEL, at)); at = LABEL.lastIndex)
            labels[label[1]] = unescape(label[2]);
        if (line[at] !== "}") return null;
        at += 1;
    }
    const word = match(VALUE, at)?.[1];
    const value = word === undefined ? NaN : number(word);
    return Number.isNaN(value) && word?.toLowerCase() !== "nan" ? null : { name: name[0], labels, value };
}

function unescape(text) {
    return text.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
}

function number(word) {
    const infinite = /^([+-]?)inf(inity)?$/i.exec(word);
    if (infinite) return infinite[1] === "-" ? -Infinity : Infinity;
    return Number(word);
}

/** The sum of a metric over all of its labels that pass; null when there is none. */
export function total(samples, name, pass = () => true) {
    const values = (samples.get(name) ?? []).filter(({ labels }) => pass(labels));
    return values.length ? values.reduce((sum, { value }) => sum + value, 0) : null;
}

/** What a counter grew by in a second; null when one of the two is unknown. After a restart it has grown from 0. */
export function rate(before, after, seconds) {
    if (before === null || after === null || !(seconds > 0)) return null;
    return (after >= before ? after - before : after) / seconds;
}

/** Upper bounds and the counts up to them, of all labels together, in order of the bounds. */
export function buckets(samples, name, pass = () => true) {
    const counts = new Map();
    for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
        if (!pass(labels)) continue;
        const bound = number(labels.le ?? "");
        counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return [...counts].sort(([a], [b]) => a - b);
}

/** What was counted between two readings of a histogram. */
export function grown(before, after) {
    const old = new Map(before);
    const restarted = after.some(([bound, count]) => count < (old.get(bound) ?? 0));
    return restarted ? after : after.map(([bound, count]) => [bound, count - (old.get(bound) ?? 0)]);
}

/** The quantile `q`, with values spread evenly within a bucket; null without any. Beyond the last bound, that bound. */
export function quantile(q, counts) {
    const all = counts.at(-1)?.[1] ?? 0;
    if (!(all > 0)) return null;
    const rank = q * all;
    let [low, below] = [0, 0];
    for (const [bound, count] of counts) {
        if (count >= rank) {
            if (bound === Infinity) return low;
            return low + (bound - low) * (count > below ? (rank - below) / (count - below) : 1);
        }
        [low, below] = [bound, count];
    }
    return low;
}
