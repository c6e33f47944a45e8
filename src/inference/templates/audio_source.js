// What the pages that listen share: the microphone as a source, and its samples as text.
const AUDIO = { channelCount: 1, echoCancellation: false, noiseSuppression: false }; // for calls; they cut words
const MONO = { channelCount: 1, channelCountMode: "explicit" };

function openSource(stream, sampleRate) {
  let refusal = null;
  for (const wish of [{ sampleRate }, {}]) { // Firefox takes a device at its own rate only
    const context = new AudioContext(wish);
    try {
      return context.createMediaStreamSource(stream);
    } catch (error) {
      refusal = error;
      context.close();
    }
  }
  throw refusal;
}

function toBase64(blocks) {
  // of int16, as `read_samples` takes "s16le"
  const pcm = new Int16Array(blocks.reduce((frames, block) => frames + block.length, 0));
  let at = 0;
  for (const block of blocks) {
    for (const sample of block) pcm[at++] = Math.max(-32768, Math.min(32767, Math.round(32768 * sample)));
  }
  return btoa(Array.from(new Uint8Array(pcm.buffer), (byte) => String.fromCharCode(byte)).join(""));
}
