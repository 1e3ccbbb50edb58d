// Elements and numbers, as all parts of the page write them.

/** Make an element; text is never taken for markup. */
export function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((each) => each !== undefined && each !== null));
  return made;
}

/** Put these in place of what is there; what has the focus keeps it, by its `data-focus`. */
export function show(parent, children) {
  const { focus } = parent.contains(document.activeElement) ? document.activeElement.dataset : {};
  parent.replaceChildren(...children);
  if (focus) parent.querySelector(`[data-focus="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
}

export function count(number) {
  return number.toLocaleString("en");
}

export function seconds(number) {
  if (number === null || number === undefined) return "–";
  return number < 1 ? `${(number * 1000).toFixed(number < 0.01 ? 1 : 0)} ms` : `${number.toFixed(2)} s`;
}

export function share(number) {
  return `${Math.round(number * 100)} %`;
}
