// One row per gateway, where there are several; one that does not answer is red and says why.

import { element, show, count } from "./words.js";

export function showGateways(section, { gateways, missing, num_gateways: expected }) {
  section.hidden = expected < 2;
  if (section.hidden) return;
  show(section.querySelector("tbody"), [
    ...gateways.map((each) => row(`${each.rank} (${each.id})`, "answers", "good", [
      each.num_connections, each.num_open_requests, each.num_held, each.num_placed,
    ])),
    ...Object.entries(missing).map(([id, reason]) => row(id, reason, "bad", [])),
  ]);
}

function row(name, words, look, numbers) {
  return element("tr", { class: look === "bad" ? "bad" : undefined },
    element("th", { scope: "row" }, name),
    element("td", {}, element("span", { class: `state ${look}` }, words)),
    ...[0, 1, 2, 3].map((index) => element("td", {}, index in numbers ? count(numbers[index]) : "–")),
  );
}
