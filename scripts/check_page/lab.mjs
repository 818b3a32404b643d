// What the browser tests share: a model, servers, a browser.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { makeModel } from "./model.mjs";

const { FERROPT, CHROMIUM, SCRATCH } = process.env;
const require = createRequire(join(SCRATCH, "node_modules", "x"));
const { chromium } = require("playwright-core");
const axe = require.resolve("axe-core/axe.min.js");

export const scratch = SCRATCH;
const model = join(SCRATCH, "model");
if (!existsSync(join(model, "model.safetensors"))) makeModel(model);

/** Starts a server; `stop` ends it with a signal. */
export async function serve(...options) {
    const always = ["--model", `small=${model}`, "--alias", "other=small", "--port", "0", "--no-log"];
    const stdio = ["ignore", "pipe", "inherit"];
    const process = spawn(FERROPT, ["serve", ...always, ...options], { stdio });
    const ended = new Promise((resolve) => process.once("exit", resolve));
    let url = null;
    for await (const line of createInterface({ input: process.stdout })) {
        url = /http:\/\/\S+?(?=;|$|\s)/.exec(line)?.[0];
        if (url) break;
    }
    assert.ok(url, "the server says where it listens");
    await until("the model is ready", async () => (await fetch(`${url}/ready`)).ok);
    const stop = (signal = "SIGKILL") => {
        process.kill(signal);
        return ended;
    };
    return { url, stop, metrics: () => metrics(url) };
}

/** The sum of a metric over its labels. */
async function metrics(url) {
    const text = await (await fetch(`${url}/metrics`)).text();
    return (name) =>
        text
            .split("\n")
            .filter((line) => line.startsWith(name + "{") || line.startsWith(name + " "))
            .reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

/** Waits until something is so. */
export async function until(what, is, seconds = 30) {
    const end = Date.now() + 1000 * seconds;
    while (Date.now() < end) {
        if (await is()) return;
        await sleep(50);
    }
    assert.fail(`${what}: not after ${seconds} s`);
}

/** A browser without a display, with a new profile, which talks to nobody but the server. */
export async function launch() {
    const args = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ];
    return chromium.launch({ executablePath: CHROMIUM, args });
}

/** Opens the page in a browser of its own; whatever the browser complains about is an error of the test. */
export async function visit(browser, url, options = {}, view = "complete") {
    const context = await browser.newContext({
        viewport: { width: 1280, height: 860 },
        permissions: ["clipboard-read", "clipboard-write"],
        ...options,
    });
    const page = await context.newPage();
    page.setDefaultTimeout(60_000);
    page.complaints = [];
    page.on("console", (message) => message.type() === "error" && page.complaints.push(message.text()));
    page.on("pageerror", (error) => page.complaints.push(String(error)));
    await page.goto(`${url}/#${view}`);
    await page.locator("main").waitFor();
    return page;
}

/** Closes the page, once it is sure that the browser had nothing to complain about but what is `expected`. */
export async function leave(page, expected = /^$/) {
    assert.deepEqual(
        page.complaints.filter((text) => !expected.test(text)),
        [],
    );
    await page.context().close();
}

/** Sets controls by their fields' names. */
export async function set(page, values) {
    const closed = page.locator(".settings details:not([open]) > summary");
    while (await closed.count()) await closed.first().click();
    for (const [name, value] of Object.entries(values)) {
        const control = page.locator(`#set-${name}`);
        if (typeof value === "boolean") await control.setChecked(value);
        else await control.fill(String(value));
    }
}

/** Does something that makes the page generate, and waits for the end of that. */
export async function finish(page, action) {
    const texts = (request) => request.url().endsWith("/completions");
    const ended = Promise.race(
        ["requestfinished", "requestfailed"].map((event) =>
            page.waitForEvent(event, { predicate: texts, timeout: 120_000 }),
        ),
    );
    await action();
    await ended;
    await page
        .locator('[role="status"]', { hasText: /^(Done|Stopped|Error)/ })
        .waitFor({ state: "attached" });
    await page.getByRole("button", { name: /^(Generate|Send)/ }).waitFor();
}

/** Generates from a prompt, to the end. */
export async function generate(page, prompt) {
    await page.fill("#prompt", prompt);
    await finish(page, () => page.keyboard.press("Control+Enter"));
}

/** The text of the first choice. */
export const textOf = (page) => page.locator(".output .list, .output .plain").first().textContent();

/** What axe finds wrong with what is on the screen. */
export async function accessibility(page, where) {
    // The page's policy lets no script in, so it comes in beside it.
    await page.evaluate(readFileSync(axe, "utf8"));
    const { violations } = await page.evaluate(() =>
        window.axe.run(document, {
            runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
        }),
    );
    const found = violations.map(
        ({ id, nodes }) =>
            `${where}: ${id}: ${nodes.map(({ html, failureSummary }) => `${html.slice(0, 120)} ${failureSummary}`).join(" | ")}`,
    );
    assert.deepEqual(found, []);
}

/** No part of the page is beyond its width. */
export async function fits(page, where) {
    const wide = await page.evaluate(
        () => document.documentElement.scrollWidth - document.documentElement.clientWidth,
    );
    assert.equal(wide, 0, `${where}: ${wide} pixels to the side`);
}
