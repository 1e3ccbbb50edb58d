// What the autoscaler expects and wants, beside what has come and what runs.

import { element, show, count, seconds } from "./words.js";

export function showScaling(section, { scalers }) {
  section.hidden = Object.keys(scalers).length === 0;
  show(document.getElementById("scaling-now"), Object.entries(scalers).flatMap(([model, scaler]) => [
    ...(model ? [element("h3", {}, model)] : []),
    element("dl", { class: "tiles" }, ...tiles(scaler)),
  ]));
}

function tiles(scaler) {
  const { wanted } = scaler;
  return [
    ["engines wanted", count(wanted.num_wanted)],
    ["engines there", count(scaler.num_running)],
    ["being emptied", count(scaler.num_emptying)],
    ["next one is ready", scaler.ready_in_s === null ? "none starts" : `in ${seconds(scaler.ready_in_s)}`],
    ["load of late", `${wanted.recent_load.toFixed(2)} engines`],
    [`load in ${seconds(wanted.start_s)}`, `${wanted.expected_load.toFixed(2)} engines`],
    ["with room for bursts", `${wanted.room_load.toFixed(2)} engines`],
    ["held work", seconds(wanted.backlog_s)],
    ["forecast by", wanted.forecast],
  ].map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

/** Return a sum over the autoscalers of all models. */
export function ofScalers({ state }, pick) {
  return Object.values(state.scalers).reduce((sum, scaler) => sum + pick(scaler), 0);
}

/** Remembers forecasts until their time has come, and says what was forecast for now. */
export class Forecasts {
  #models = new Map(); // by model: those to come, [when it is for, load], and the one for now

  /** Return the load that was expected for the moment of this frame; null before the first. */
  dueNow({ time_s: nowS, state: { scalers } }) {
    let sum = null;
    for (const [model, { wanted }] of Object.entries(scalers)) {
      const known = this.#models.get(model) ?? { coming: [], due: null };
      this.#models.set(model, known);
      known.coming.push([nowS + wanted.start_s, wanted.expected_load]);
      while (known.coming.length && known.coming[0][0] <= nowS) known.due = known.coming.shift()[1];
      if (known.due !== null) sum = (sum ?? 0) + known.due;
    }
    return sum;
  }
}
