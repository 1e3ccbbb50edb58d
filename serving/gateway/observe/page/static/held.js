// What waits in the hold queue, by class, and whether what it was promised is still in reach.

import { element, show, count, seconds } from "./words.js";

export function showHeld(rows, { held }) {
  const classes = Object.entries(held.by_class);
  show(rows, classes.map(([name, each]) => row(name, each)));
  rows.closest("table").hidden = classes.length === 0;
  document.getElementById("held-none").hidden = classes.length > 0;
}

function row(name, each) {
  const late = each.num_late ? `${count(each.num_late)} late` : "";
  return element("tr", { "data-class": name },
    element("th", { scope: "row" }, name),
    element("td", {}, count(each.num_requests)),
    element("td", {}, `${count(each.num_tokens)} tokens`),
    element("td", {}, seconds(each.oldest_s)),
    element("td", {}, each.due_in_s === null ? "–" : `in ${seconds(each.due_in_s)}`),
    element("td", {}, late ? element("span", { class: "state warn" }, late) : "none"),
  );
}
