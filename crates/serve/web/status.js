// How the server does, and which models it has.
import { html, useEffect } from "./dom.js";
import { duration } from "./generation.js";
import { findModels, models } from "./models.js";
import { Plot } from "./plot.js";
import { useStore } from "./store.js";
import { look, watch } from "./watch.js";

const rounded = (value) =>
    value >= 100 || Number.isInteger(value)
        ? value.toFixed(0)
        : value >= 10
          ? value.toFixed(1)
          : value.toFixed(2);

const PLOTS = [
    {
        title: "Tokens a second",
        show: rounded,
        most: 1,
        series: [
            { value: "generated", label: "generated", colour: "line-1" },
            { value: "prompt", label: "of prompts", colour: "line-2" },
        ],
    },
    {
        title: "Time to the first token",
        show: duration,
        most: 0.01,
        series: [
            { value: "first50", label: "median", colour: "line-1" },
            { value: "first95", label: "95 % within", colour: "line-2" },
        ],
    },
    {
        title: "Time between tokens",
        show: duration,
        most: 0.01,
        series: [
            { value: "between50", label: "median", colour: "line-1" },
            { value: "between95", label: "95 % within", colour: "line-2" },
        ],
    },
    {
        title: "Texts",
        show: rounded,
        most: 4,
        series: [
            { value: "running", label: "running", colour: "line-1" },
            { value: "waiting", label: "in the queue", colour: "line-2" },
        ],
    },
    {
        title: "Cache in use",
        show: (value) => `${rounded(value)} %`,
        most: 10,
        series: [{ value: "cache", label: "of all pages", colour: "line-1" }],
    },
    {
        title: "Requests a second",
        show: rounded,
        most: 1,
        series: [
            { value: "answers", label: "answered", colour: "line-1" },
            { value: "refusals", label: "refused or failed", colour: "line-3" },
        ],
    },
];

const COLUMNS = ["Name", "State", "Positions", "Open since"];

export function Status() {
    const { points, ready, lost } = useStore(watch);
    const { list } = useStore(models);
    useEffect(look, []);
    // A model that became ready, or failed, is listed otherwise.
    useEffect(() => void findModels(), [JSON.stringify([...ready])]);
    return html`
        <section class="status" aria-label="Status">
            ${
                lost &&
                html`<div class="notice bad">
                <p>The server's metrics cannot be read: ${lost.message}. Trying again every second.</p>
            </div>`
            }
            <div class="plots">${PLOTS.map((plot) => html`<${Plot} key=${plot.title} points=${points} ...${plot} />`)}</div>
            <section class="card">
                <h2 id="models-title">Models</h2>
                <div class="scrolls" tabindex="0" role="region" aria-labelledby="models-title">
                    <table>
                        <thead>
                            <tr>${COLUMNS.map((name) => html`<th key=${name} scope="col">${name}</th>`)}</tr>
                        </thead>
                        <tbody>${list.map((model) => html`<${Model} key=${model.id} model=${model} />`)}</tbody>
                    </table>
                </div>
            </section>
        </section>
    `;
}

function Model({ model }) {
    const { id, root, status, max_model_len: positions, created } = model;
    const alias = root && root !== id;
    return html`
        <tr>
            <th scope="row">${id}${alias && html` <span class="hint">is ${root}</span>`}</th>
            <td><span class=${`state ${status}`}>${status}</span></td>
            <td>${positions ?? "–"}</td>
            <td>${created ? new Date(created * 1000).toLocaleString() : "–"}</td>
        </tr>
    `;
}
