// The last requests, and the way of the one that was chosen.

import { element, show, count, seconds } from "./words.js";

const SHOWN = 20;

export class Requests {
  #chosen = null;
  #last = [];
  #shown = "";

  show(requests) {
    this.#last = requests;
    const rows = document.getElementById("request-rows");
    show(rows, requests.slice(0, SHOWN).map((each) => this.#row(each)));
    const chosen = requests.find((each) => each.id === this.#chosen);
    const shown = JSON.stringify([chosen?.id, chosen?.events]);
    if (!chosen || shown === this.#shown) return; // said once, to whoever hears it
    this.#shown = shown;
    show(document.getElementById("way"), [element("h3", {}, chosen.id), element("p", {}, `By gateway ${chosen.gateway}.`), way(chosen)]);
  }

  #row(request) {
    const held = find(request, "held");
    const sent = request.events.findLast((event) => event.what === "sent");
    const first = find(request, "first_token");
    return element("tr", {},
      element("td", {}, element("button", {
        class: "link", "data-focus": request.id, onclick: () => { this.#chosen = request.id; this.show(this.#last); },
      }, request.id.slice(0, 18))),
      element("td", {}, request.request_class),
      element("td", {}, count(request.num_prompt_tokens)),
      element("td", {}, request.num_output_tokens === null ? "–" : count(request.num_output_tokens)),
      element("td", {}, standing(request)),
      element("td", {}, sent ? sent.where : "–"),
      element("td", {}, seconds(sent?.predicted_ttft_s)),
      element("td", {}, seconds(first?.after_s)),
      element("td", { class: "words" }, held ? held.why : ""),
    );
  }
}

function find(request, what) {
  return request.events.find((event) => event.what === what);
}

/** Return in a word where a request stands. */
export function standing(request) {
  if (request.is_over) return request.outcome || `status ${request.status}`;
  if (find(request, "first_token")) return "decoding";
  if (find(request, "sent")) return "at an engine";
  return "held";
}

const WORDS = { arrived: "arrived", chosen: "model", held: "held", sent: "sent", first_token: "first token", over: "over" };

/** Return a request's way in time, as a list. */
export function way(request) {
  return element("ol", { class: "way" }, ...request.events.map((event) => element("li", {},
    element("time", {}, seconds(event.after_s ?? 0)), " ",
    element("strong", {}, WORDS[event.what] ?? event.what),
    event.where ? ` ${{ sent: "to ", chosen: "" }[event.what] ?? "from "}${event.where}` : "",
    event.predicted_ttft_s ? `, first token predicted after ${seconds(event.predicted_ttft_s)}` : "",
    event.why ? `: ${event.why}` : "",
    event.what === "over" && request.outcome ? ` (${request.outcome})` : "",
  )));
}
