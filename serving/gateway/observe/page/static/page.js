// The live page: reads the feed, and hands each frame to those who show a part of it.

import { Charts } from "./charts.js";
import { showEngines } from "./engines.js";
import { showHeld } from "./held.js";
import { showModels } from "./models.js";
import { Orders } from "./orders.js";
import { Pace } from "./pace.js";
import { showScaling } from "./scaling.js";
import { readFrames, Refused } from "./feed.js";
import { showGateways } from "./gateways.js";
import { Playground } from "./playground.js";
import { Requests } from "./requests.js";
import { showOthers } from "./others.js";
import { element, show, count, seconds } from "./words.js";

const charts = new Charts(document.getElementById("charts"));
const requests = new Requests();
const playground = new Playground(headers);
const orders = new Orders(headers, document.getElementById("order-said"));
const pace = new Pace(showFrame);
const link = document.getElementById("link");
const keyForm = document.getElementById("key-form");
const RETRY_MS = 1000;

function headers() {
  const key = sessionStorage.getItem("headway-key");
  return key ? { authorization: `Bearer ${key}` } : {};
}

function showFrame(frame) {
  const { state } = frame;
  document.getElementById("about").textContent =
    `${frame.num_gateways > 1 ? `${frame.gateways.length} of ${frame.num_gateways} gateways` : `gateway ${state.rank}`} · policy ${[state.policy, ...state.ablate.map((part) => `without ${part}`)].join(" ")} · core ${state.core}`;
  const streams = frame.latencies.filter((each) => each.ttft_s);
  const worst = (pick) => (streams.length ? seconds(Math.max(...streams.map(pick))) : "–");
  show(document.getElementById("now"), [
    ["held", `${count(state.held.num_requests)} requests`],
    ["their prompts", `${count(state.held.num_tokens)} tokens`],
    ["at engines", count(state.num_placed)],
    ["at providers", count(state.fallback.num_open)],
    ["output", `${count(Math.round(frame.latencies.reduce((sum, each) => sum + each.output_tokens_per_s, 0)))} tokens/s`],
    ["TTFT p50", worst((each) => each.ttft_s.p50)],
    ["TTFT p99", worst((each) => each.ttft_s.p99)],
    ["connections", count(state.num_connections)],
  ].map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  showGateways(document.getElementById("gateways"), frame);
  showModels(document.getElementById("models"), state);
  showEngines(document.getElementById("engine-rows"), frame, orders);
  showHeld(document.getElementById("held-rows"), state);
  showScaling(document.getElementById("scaling"), state);
  charts.add(frame);
  requests.show(frame.requests);
  playground.show(frame);
  showOthers(document.getElementById("others"), state);
}

function say(words, isBad) {
  link.textContent = words;
  link.className = isBad ? "bad" : "";
}

async function run() {
  for (;;) {
    try {
      await readFrames("live", headers(), (frame) => {
        say("live", false);
        keyForm.hidden = true;
        pace.add(frame);
      });
      say("the gateway has ended the connection; asking again", true);
    } catch (error) {
      if (error instanceof Refused) {
        say("a key is needed", true);
        document.getElementById("key-error").textContent = sessionStorage.getItem("headway-key") ? error.message : "";
        keyForm.hidden = false;
        return; // until there is a key
      }
      say("no connection to the gateway; asking again", true);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("headway-key", document.getElementById("key").value);
  run();
});

run();
