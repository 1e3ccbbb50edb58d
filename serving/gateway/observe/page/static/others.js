// Providers with what is used of their limits, and tenants.

import { element, show, count } from "./words.js";

export function showOthers(parent, state) {
  const keys = Object.entries(state.fallback.providers).flatMap(([name, provider]) =>
    Object.entries(provider.keys).map(([key, { breaker, budget }]) => [
      `${name}/${key}`, breaker.state, used(budget.requests), used(budget.tokens), used(budget.cost_day), provider.cost.toFixed(4),
    ]));
  const tenants = Object.entries(state.tenants.by_name).map(([name, tenant]) => [
    name, count(tenant.num_requests), count(tenant.num_refused), count(tenant.num_prompt_tokens),
    count(tenant.num_output_tokens), count(tenant.num_concurrent), String(tenant.weight),
  ]);
  show(parent, [
    ...table("Providers", ["key", "breaker", "requests", "tokens", "cost of the day", "spent"], keys, "No provider is configured."),
    ...table("Tenants", ["tenant", "requests", "refused", "prompt tokens", "output tokens", "open", "weight"], tenants, "Nobody needs a key, or nobody has been here."),
  ]);
}

function used({ used: number, limit }) {
  const amount = count(Math.round(number * 100) / 100);
  return limit === null ? amount : `${amount} of ${count(limit)}`;
}

function table(title, names, rows, otherwise) {
  if (!rows.length) return [element("h3", {}, title), element("p", {}, otherwise)];
  return [
    element("h3", {}, title),
    element("table", {},
      element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...rows.map(([name, ...cells]) =>
        element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell))))),
    ),
  ];
}
