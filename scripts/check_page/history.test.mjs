// The page's history in a browser whose storage is shared by tabs, full, or refused. Run by scripts/check-page.
import assert from "node:assert/strict";
import test from "node:test";

let room = Infinity;
let refused = false;
let listener;
const data = new Map();

globalThis.window = {
    addEventListener: (_, heard) => {
        listener = heard;
    },
    localStorage: {
        getItem: (name) => {
            if (refused) throw new Error("refused");
            return data.get(name) ?? null;
        },
        setItem: (name, value) => {
            if (refused || value.length > room) throw new Error("no room");
            data.set(name, value);
        },
        removeItem: (name) => data.delete(name),
    },
};

/** The page's module in a tab of its own, and what tells it of other tabs. */
async function tab(number) {
    const page = await import(`../../crates/serve/web/history.js?${number}`);
    return { ...page, hear: listener, ids: () => page.history.value.entries.map(({ id }) => id) };
}

test("tabs see what others keep, and take nothing from them", async () => {
    const [one, other] = [await tab(1), await tab(2)];
    one.remember({ id: "a" });
    other.remember({ id: "b" });
    assert.deepEqual(
        JSON.parse(data.get("ferropt.history")).map(({ id }) => id),
        ["b", "a"],
    );
    one.hear({ key: "ferropt.history" });
    assert.deepEqual(one.ids(), ["b", "a"]);
    one.forget("b");
    other.hear({ key: "ferropt.history" });
    assert.deepEqual(other.ids(), ["a"]);
});

test("what there is no room for lasts as long as the page", async () => {
    data.clear();
    const full = await tab(3);
    room = 150;
    for (let i = 0; i < 8; i += 1) full.remember({ id: `c${i}`, text: "y".repeat(20) });
    assert.deepEqual(
        full.ids(),
        [7, 6, 5, 4, 3, 2, 1, 0].map((i) => `c${i}`),
    );
    assert.ok(JSON.parse(data.get("ferropt.history")).length < 8);
    full.forget("c0");
    full.forget("c7");
    assert.deepEqual(
        full.ids(),
        [6, 5, 4, 3, 2, 1].map((i) => `c${i}`),
    );
    refused = true;
    const none = await tab(4);
    none.remember({ id: "d" });
    assert.deepEqual(none.ids(), ["d"]);
    none.forget("d");
    assert.deepEqual(none.ids(), []);
});
