// The panel of controls.
import { Button, html, useEffect, useRef } from "./dom.js";
import { DEFAULTS, FIELDS, GROUPS } from "./fields.js";
import { Store, keep, recall, useStore } from "./store.js";

const kept = recall("localStorage", "settings", {});
const TYPES = { number: ["number", "string"], text: ["string"], flag: ["boolean"] };
const known = FIELDS.filter(({ name, kind }) => TYPES[kind].includes(typeof kept?.[name]));
/** A number that was typed is a text, which may mean the same. */
const isChanged = ({ name, value }, values) => String(values[name]) !== String(value);

/** Values by name, as they were typed; `wrong` is the control that an error is about: `{ field, message }`. */
export const settings = new Store({
    values: { ...DEFAULTS, ...Object.fromEntries(known.map(({ name }) => [name, kept[name]])) },
    wrong: null,
});

export function change(changes) {
    const values = { ...settings.value.values, ...changes };
    const { wrong } = settings.value;
    keep("localStorage", "settings", values);
    settings.set({ values, wrong: wrong && wrong.field in changes ? null : wrong });
}

/** Says at a control what is wrong with it. */
export function blame(field, message) {
    settings.set({ wrong: field && { field, message } });
}

export function Settings({ chat }) {
    const { values, wrong } = useStore(settings);
    const changed = FIELDS.some((field) => isChanged(field, values));
    return html`
        <div class="settings">
            ${GROUPS.filter((group) => !chat || !group.completion).map(
                (group) =>
                    html`<${Group} key=${group.title} group=${group} values=${values} wrong=${wrong} />`,
            )}
            <${Button} disabled=${!changed} onClick=${() => change(DEFAULTS)}>Reset all<//>
        </div>
    `;
}

function Group({ group, values, wrong }) {
    const details = useRef(null);
    const blamed = group.fields.some(({ name }) => name === wrong?.field);
    useEffect(() => {
        if (!blamed) return;
        // A control that is folded away, or off the screen, cannot be corrected.
        details.current.open = true;
        details.current.querySelector('[aria-invalid="true"]')?.focus();
    }, [wrong]);
    const changed = group.fields.filter((field) => isChanged(field, values)).length;
    return html`
        <details ref=${details} open=${group.open || changed > 0}>
            <summary>
                ${group.title}
                ${changed > 0 && html`<span class="count" title=${`${changed} changed`}>${changed}</span>`}
            </summary>
            ${group.fields.map(
                (field) => html`<${Control}
                    key=${field.name}
                    field=${field}
                    value=${values[field.name]}
                    wrong=${field.name === wrong?.field ? wrong.message : null}
                    off=${(field.sampling && values.greedy) || (field.needs && values[field.needs] === "")}
                />`,
            )}
        </details>
    `;
}

function Control({ field, value, wrong, off }) {
    const { name, label, hint, kind } = field;
    const id = `set-${name}`;
    const set = (value) => change({ [name]: value });
    const described = `${id}-hint${wrong ? ` ${id}-wrong` : ""}`;
    const common = {
        id,
        name,
        "aria-describedby": described,
        "aria-invalid": wrong ? "true" : undefined,
        disabled: off,
    };
    const help = html`<p class="hint" id="${id}-hint">${hint}</p>`;
    const error = wrong && html`<p class="wrong" id="${id}-wrong">${wrong}</p>`;
    if (kind === "flag") {
        return html`
            <div class="control flag">
                <label for=${id}>
                    <input type="checkbox" ...${common} checked=${value} onChange=${(e) => set(e.target.checked)} /> ${label}
                </label>
                ${help}${error}
            </div>
        `;
    }
    if (kind === "text") {
        return html`
            <div class="control">
                <label for=${id}>${label}</label>
                <textarea ...${common} rows=${field.rows} spellcheck=${false} value=${value}
                    onInput=${(e) => set(e.target.value)}></textarea>
                ${help}${error}
            </div>
        `;
    }
    // It stays as it was typed, so that what is wrong can be corrected.
    const { slider, step } = field;
    const arrows = (e) => {
        const by = { ArrowUp: step, ArrowDown: -step }[e.key];
        const now = Number(value === "" ? (slider?.[0] ?? 0) : value);
        if (!by || !Number.isFinite(now)) return;
        e.preventDefault();
        set(Math.min(field.max, Math.max(field.min, Number((now + by).toFixed(4)))));
    };
    return html`
        <div class="control number">
            <label for=${id}>${label}</label>
            <input type="text" ...${common} inputmode=${field.min < 0 ? "text" : field.whole ? "numeric" : "decimal"}
                autocomplete="off" placeholder=${field.value === "" ? "none" : field.value} value=${value}
                onInput=${(e) => set(e.target.value.trim())} onKeyDown=${arrows} />
            ${
                slider &&
                html`<input type="range" min=${slider[0]} max=${slider[1]} step=${step} tabindex="-1" aria-hidden="true" 
                    disabled=${off} value=${Number.isFinite(Number(value)) && value !== "" ? value : field.value}
                    onInput=${(e) => set(e.target.valueAsNumber)} />`
            }
            ${help}${error}
        </div>
    `;
}
