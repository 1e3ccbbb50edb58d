// One row per engine; one that has gone stays for a while, in red.

import { element, show, count, seconds, share } from "./words.js";

const KEPT_S = 60;
const seen = new Map(); // by id: the last that was known, and when

export function showEngines(rows, { state, engines, time_s: nowS }, orders) {
  const { replicas, drained, hardware } = state;
  for (const [id, replica] of Object.entries(replicas)) seen.set(id, { replica, atS: nowS });
  for (const [id, { atS }] of seen) if (nowS - atS > KEPT_S) seen.delete(id);
  const sorted = [...seen].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  show(rows, sorted.map(([id, { replica, atS }]) => row(id, replica, {
    isThere: id in replicas, goneS: nowS - atS, isDrained: drained.includes(id),
    latency: engines[id], hardware: hardware[id], orders,
  })));
}

function row(id, replica, { isThere, goneS, isDrained, latency, hardware, orders }) {
  const [words, look] = isThere ? condition(replica, isDrained) : [`gone for ${seconds(goneS)}`, "bad"];
  const { info, snapshot } = replica;
  const kv = snapshot ? snapshot.kv_cache_usage : 0;
  const pending = replica.num_pending_prefill_tokens;
  return element("tr", { "data-engine": id, class: look === "bad" ? "bad" : undefined },
    element("th", { scope: "row", title: info.engine }, id),
    element("td", {}, element("span", { class: `state ${look}` }, words)),
    element("td", {}, isThere ? orders.button(id, isDrained) : ""),
    element("td", {}, bar(kv, 1, `KV cache of ${id}`), ` ${share(kv)}`),
    element("td", {}, bar(pending, 2 * info.max_num_batched_tokens, `pending prefill of ${id}`), ` ${count(pending)}`),
    element("td", {}, snapshot ? count(snapshot.num_running_reqs) : "–"),
    element("td", {}, snapshot ? count(snapshot.num_waiting_reqs) : "–"),
    element("td", {}, seconds(replica.ttft_s)),
    element("td", {}, latency ? `${seconds(latency.predicted_ttft_s.p50)} / ${seconds(latency.answered_in_s.p50)}` : "–"),
    element("td", {}, `${count(Math.round(replica.prefill_tokens_per_s))} tokens/s`),
    element("td", {}, info.device, ...(hardware?.gpus ?? []).map((gpu) => element("div", {}, gpuNow(gpu))),
      trouble(hardware)),
  );
}

/** Return in words how a GPU is, as far as it tells. */
function gpuNow(gpu) {
  const gib = (bytes) => (bytes / 2 ** 30).toFixed(0);
  return [
    gpu.utilization === null ? "" : `${share(gpu.utilization)} busy`,
    gpu.num_bytes && gpu.num_free_bytes !== null ? `${gib(gpu.num_bytes - gpu.num_free_bytes)} of ${gib(gpu.num_bytes)} GiB` : "",
    gpu.power_w === null ? "" : `${count(Math.round(gpu.power_w))} W`,
    gpu.temperature_c === null ? "" : `${gpu.temperature_c} °C`,
    gpu.slowed_by.length ? `slowed by ${gpu.slowed_by.join(", ")}` : "",
  ].filter(Boolean).join(", ");
}

function trouble(hardware) {
  if (hardware?.fault) return element("div", { class: "state bad" }, hardware.fault);
  return hardware?.slow ? element("div", { class: "state warn" }, hardware.slow) : "";
}

function bar(value, max, name) {
  return element("meter", { min: 0, max, value: Math.min(value, max), "aria-label": name });
}

/** Return in words how an engine is, and how that looks. */
export function condition(replica, isDrained) {
  const { state, reason } = replica.breaker;
  if (state === "open") return [`failed: ${reason}`, "bad"];
  if (replica.is_mute) return ["sends no news", "bad"];
  if (state === "half_open") return ["on probe", "warn"];
  if (replica.is_draining) return [isDrained ? "drained by an admin" : "draining", "warn"];
  if (replica.is_quarantined) return ["tries a suspect", "warn"];
  return ["ready", "good"];
}
