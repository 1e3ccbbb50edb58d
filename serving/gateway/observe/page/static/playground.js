// Sends a prompt, shows the answer as it comes, and then the request's way.

import { problem, readEvents } from "./feed.js";
import { way } from "./requests.js";
import { element, show } from "./words.js";

export class Playground {
  #headers;
  #models = [];
  #id = null; // of the request whose answer is on its way

  constructor(headers) {
    this.#headers = headers;
    document.getElementById("play").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
  }

  /** Offer the models that engines serve, and show how far the request has come. */
  show({ state, requests }) {
    this.#useModels(state.replicas);
    const mine = this.#id && requests.find((each) => each.id === this.#id);
    if (mine) showWay(mine);
  }

  #useModels(replicas) {
    const models = [...new Set(Object.values(replicas).flatMap(({ info }) => [info.model, ...info.aliases]))];
    if (models.join() === this.#models.join()) return;
    this.#models = models;
    show(document.getElementById("play-model"), models.map((name) => element("option", {}, name)));
  }

  async #send() {
    const answer = document.getElementById("play-answer");
    const id = `play-${crypto.randomUUID?.() ?? Math.random().toString(36).slice(2)}`;
    show(answer, []);
    show(document.getElementById("play-way"), []);
    this.#id = id;
    const reply = await fetch("../v1/chat/completions", {
      method: "POST",
      headers: {
        ...this.#headers(), "content-type": "application/json", "x-request-id": id,
        "x-headway-class": document.getElementById("play-class").value,
      },
      body: JSON.stringify({
        model: document.getElementById("play-model").value,
        messages: [{ role: "user", content: document.getElementById("play-prompt").value }],
        max_tokens: Number(document.getElementById("play-tokens").value),
        stream: true,
      }),
    });
    if (!reply.ok) {
      show(answer, [element("p", { class: "bad" }, await problem(reply))]);
    } else {
      for await (const data of readEvents(reply.body)) {
        if (data === "[DONE]") break;
        const { choices, error } = JSON.parse(data);
        answer.append(error ? `\n${error.message}` : choices?.[0]?.delta?.content ?? "");
      }
    }
    if (this.#id === id) this.#id = null; // unless another was sent meanwhile
    await this.#showWhole(id);
  }

  async #showWhole(id) {
    const reply = await fetch(`requests?id=${encodeURIComponent(id)}`, { headers: this.#headers() });
    if (reply.ok) showWay(await reply.json());
  }
}

function showWay(request) {
  show(document.getElementById("play-way"), [element("h3", {}, "Its way"), way(request)]);
}
