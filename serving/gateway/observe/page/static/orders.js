// What an admin tells engines: to get no new work, or some again.

import { problem } from "./feed.js";
import { element } from "./words.js";

export class Orders {
  #headers;
  #status;
  #asked = new Set(); // engines whose order is on its way

  constructor(headers, status) {
    this.#headers = headers;
    this.#status = status;
  }

  /** Return the button that drains this engine or takes it back. */
  button(engine, isDrained) {
    const words = isDrained ? "Take back" : "Drain";
    return element("button", {
      type: "button", "aria-label": `${words} ${engine}`,
      "data-focus": `order ${engine}`, "aria-disabled": this.#asked.has(engine) ? "true" : undefined,
      onclick: () => { if (!this.#asked.has(engine)) this.#give(engine, isDrained ? "undrain" : "drain"); },
    }, words);
  }

  async #give(engine, what) {
    this.#asked.add(engine);
    try {
      // The listener takes no escaped slash, and servers that already run have a colon in their name.
      const path = engine.split("/").map(encodeURIComponent).join("/").replaceAll("%3A", ":");
      const reply = await fetch(`engines/${path}/${what}`, { method: "POST", headers: this.#headers() });
      this.#say(...(reply.ok ? outcome(engine, await reply.json()) : [await problem(reply), true]));
    } catch {
      this.#say(`${engine}: no connection to the gateway`, true);
    }
    this.#asked.delete(engine);
  }

  #say(words, isBad) {
    this.#status.textContent = words;
    this.#status.className = isBad ? "bad" : "";
  }
}

/** Return in words what has become of an order, and whether that is bad. */
function outcome(engine, { drains, gateways = {} }) {
  const deaf = Object.entries(gateways).filter(([, each]) => each.error);
  const words = `${engine} gets ${drains ? "no new work; what it has goes on" : "work again"}`;
  if (!deaf.length) return [words, false];
  return [`${words}, but not from ${deaf.map(([id, { error }]) => `gateway ${id} (${error})`).join(", ")}`, true];
}
