// One row per model, where several are served.

import { element, show, count, share } from "./words.js";
import { condition } from "./engines.js";

export function showModels(section, state) {
  const models = new Map(); // by its own name: its engines
  for (const [id, replica] of Object.entries(state.replicas)) {
    const { model } = replica.info;
    models.set(model, [...(models.get(model) ?? []), { id, replica }]);
  }
  // One without engines may be waited for all the same.
  const aliases = new Set(Object.values(state.replicas).flatMap(({ info }) => info.aliases));
  for (const name of Object.keys(state.held.num_tokens_by_model)) {
    if (!models.has(name) && !aliases.has(name)) models.set(name, []);
  }
  section.hidden = models.size < 2;
  if (section.hidden) return;
  const sorted = [...models].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  show(section.querySelector("tbody"), sorted.map(([name, engines]) => row(name, engines, state)));
}

function row(name, engines, state) {
  const names = [name, ...new Set(engines.flatMap(({ replica }) => replica.info.aliases))];
  const ready = engines.filter(({ replica }) => condition(replica, false)[1] === "good").length;
  const isLate = names.some((each) => state.is_overloaded[each]);
  const [words, look] = !ready ? ["no engine is ready", "bad"] : isLate ? ["overloaded", "warn"] : ["ready", "good"];
  const total = (pick) => engines.reduce((sum, { replica }) => sum + (replica.snapshot ? pick(replica.snapshot) : 0), 0);
  const held = names.reduce((sum, each) => sum + (state.held.num_tokens_by_model[each] ?? 0), 0);
  const error = state.accuracy_by_model[name]?.ttft.error_p50;
  return element("tr", { "data-model": name, class: look === "bad" ? "bad" : undefined },
    element("th", { scope: "row" }, names.join(", ")),
    element("td", {}, element("span", { class: `state ${look}` }, words)),
    element("td", {}, `${count(ready)} of ${count(engines.length)}`),
    element("td", {}, count(total((each) => each.num_running_reqs))),
    element("td", {}, count(total((each) => each.num_waiting_reqs))),
    element("td", {}, `${count(held)} tokens`),
    element("td", {}, error === null || error === undefined ? "–" : share(error)),
  );
}
