// A curve of the last minutes.
import { html, useEffect, useRef, useState } from "./dom.js";
import uPlot from "./vendor/uplot.js";

/** Seconds on the axis, at least and at most. */
const [LEAST, MOST] = [60, 300];
const HEIGHT = 132;

/**
 * `points` as in watch.js; `series` are `{ value, label, colour }`, with a name of the style's colours; `show` writes a
 * value; `most` is the least that the axis goes up to.
 */
export function Plot({ title, points, series, show, most }) {
    const box = useRef(null);
    const plot = useRef(null);
    const probe = useRef(null);
    // The place that is pointed at.
    const [at, setAt] = useState(null);
    const last = points.at(-1) ?? {};
    const told = points[at] ?? last;
    const said = (one) => (one === null || one === undefined ? "–" : show(one));

    useEffect(() => {
        // A canvas knows no variables of the style, so their values are looked up each time that something is drawn.
        const colour = (name) => () => {
            probe.current.style.color = `var(--${name})`;
            return getComputedStyle(probe.current).color;
        };
        const font = `11px ${getComputedStyle(box.current).fontFamily}`;
        const axis = {
            stroke: colour("muted"),
            font,
            grid: { stroke: colour("grid"), width: 1 },
            ticks: { show: false },
        };
        plot.current = new uPlot(
            {
                width: box.current.clientWidth,
                height: HEIGHT,
                legend: { show: false },
                hooks: { setCursor: [(u) => setAt(u.cursor.idx ?? null)] },
                cursor: { y: false, points: { size: 5 } },
                padding: [6, 18, 0, 0],
                scales: { y: { range: (_, __, max) => [0, Math.max(most, max ?? 0) * 1.08] } },
                axes: [
                    { ...axis, space: 70, size: 22, values: (u, times) => times.map((at) => clock(at)) },
                    { ...axis, space: 34, size: 52, values: (_, values) => values.map(show) },
                ],
                series: [
                    {},
                    ...series.map(({ label, colour: name }) => ({
                        label,
                        stroke: colour(name),
                        width: 1.5,
                        points: { show: false },
                        spanGaps: false,
                    })),
                ],
            },
            [[], ...series.map(() => [])],
            box.current,
        );
        const sized = new ResizeObserver(() =>
            plot.current.setSize({ width: box.current.clientWidth, height: HEIGHT }),
        );
        sized.observe(box.current);
        // Colours change with the style.
        const redraw = () => plot.current.redraw(false, true);
        const dark = window.matchMedia("(prefers-color-scheme: dark)");
        dark.addEventListener("change", redraw);
        const themed = new MutationObserver(redraw);
        themed.observe(document.documentElement, { attributes: true });
        return () => {
            sized.disconnect();
            themed.disconnect();
            dark.removeEventListener("change", redraw);
            plot.current.destroy();
        };
    }, []);

    useEffect(() => {
        const now = last.at ?? Date.now() / 1000;
        plot.current.setData(
            [
                points.map(({ at }) => at),
                ...series.map(({ value }) => points.map((one) => one[value] ?? null)),
            ],
            false,
        );
        const span = Math.min(MOST, Math.max(LEAST, now - (points[0]?.at ?? now)));
        plot.current.setScale("x", { min: now - span, max: now });
    }, [points]);

    const summary = series.map(({ value, label }) => `${label} ${said(last[value])}`).join(", ");
    return html`
        <section class="card plot">
            <h2>${title}${points[at] && html` <span class="hint">at ${clock(told.at)}</span>`}</h2>
            <dl>
                ${series.map(({ value, label, colour }) => {
                    const line = html`<span class="key-line" style=${{ background: `var(--${colour})` }}></span>`;
                    return html`<div key=${value}><dt>${line}${label}</dt><dd>${said(told[value])}</dd></div>`;
                })}
            </dl>
            <div ref=${box} class="canvas" role="img" aria-label=${`${title}: ${summary}`}></div>
            <span ref=${probe} hidden></span>
        </section>
    `;
}

/** A time of the day, in the browser's own zone. */
function clock(at) {
    const date = new Date(at * 1000);
    const two = (n) => String(n).padStart(2, "0");
    return `${two(date.getHours())}:${two(date.getMinutes())}${date.getSeconds() ? `:${two(date.getSeconds())}` : ""}`;
}
