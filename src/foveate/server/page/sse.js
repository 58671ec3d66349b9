/** Server-sent events of a response to POST, which EventSource cannot send. */

/**
 * The `data` of every event of a stream, parsed as JSON; comments and unknown fields are left out.
 *
 * @param {ReadableStream<Uint8Array>} stream
 */
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A carriage return at the end may be half of a line's end, so it waits for what follows.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          const text = data.join("\n");
          data = [];
          if (text !== "[DONE]") yield JSON.parse(text);
        }
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
