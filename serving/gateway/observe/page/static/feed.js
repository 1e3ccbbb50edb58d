// Frames as they come. Not by EventSource, which cannot send a key.

export class Refused extends Error {}

/** Read frames until the stream ends; throws `Refused` where another key is needed. */
export async function readFrames(url, headers, onFrame) {
  const reply = await fetch(url, { headers, cache: "no-store" });
  if (reply.status === 401 || reply.status === 403) throw new Refused(await problem(reply));
  if (!reply.ok) throw new Error(await problem(reply));
  for await (const data of readEvents(reply.body)) onFrame(JSON.parse(data));
}

/** Yield the data of each server-sent event. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

/** Return what an error reply says. */
export async function problem(reply) {
  const text = await reply.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `status ${reply.status}`;
  }
}
