// When are frames shown? Not while a button or key is down: what is pressed must still be there
// when it is let go, or the browser sees no click.

const MAX_PRESS_MS = 2000; // where nobody says that it was let go

export class Pace {
  #show;
  #waiting = null;
  #pressedMs = -Infinity;

  constructor(show) {
    this.#show = show;
    for (const name of ["pointerdown", "keydown"]) addEventListener(name, () => { this.#pressedMs = performance.now(); }, true);
    for (const name of ["pointerup", "pointercancel", "keyup"]) addEventListener(name, () => this.#letGo(), true);
    addEventListener("blur", () => this.#letGo()); // the window's own
  }

  add(frame) {
    this.#waiting = frame;
    if (performance.now() - this.#pressedMs > MAX_PRESS_MS) this.#showNow();
  }

  #letGo() {
    this.#pressedMs = -Infinity;
    setTimeout(() => this.#showNow()); // the click comes first
  }

  #showNow() {
    const frame = this.#waiting;
    this.#waiting = null;
    if (frame !== null) this.#show(frame);
  }
}
