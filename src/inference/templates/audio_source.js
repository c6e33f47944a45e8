// What the pages that listen share: the microphone as a source of blocks, and its samples as text.
const AUDIO = { channelCount: 1, echoCancellation: false, noiseSuppression: false }; // for calls; they cut words
const MONO = { channelCount: 1, channelCountMode: "explicit" };
const INSECURE = "Browsers give a microphone to pages of this machine (127.0.0.1) and of https alone; open one of those.";
const WORKLET = `registerProcessor("blocks", class extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.block = new Float32Array(processorOptions.frames);
    this.filled = 0;
  }
  process([[samples]]) {
    if (!samples) return true; // no audio yet
    this.block.set(samples, this.filled);
    this.filled += samples.length;
    if (this.filled === this.block.length) {
      this.port.postMessage(this.block); // a copy
      this.filled = 0;
    }
    return true;
  }
});`;

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

async function makeListener(context, frames, hear) {
  // `hear` gets blocks of so many samples, a power of 2; connect the node to the destination: what leads nowhere may
  // not run. It gives silence.
  try {
    await context.audioWorklet.addModule(URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" })));
    const node = new AudioWorkletNode(context, "blocks", { ...MONO, processorOptions: { frames } });
    node.port.onmessage = ({ data }) => hear(data);
    return node;
  } catch { // an old browser, or a page that forbids modules of its own making
    const node = context.createScriptProcessor(frames, 1, 1);
    node.onaudioprocess = ({ inputBuffer }) => hear(inputBuffer.getChannelData(0).slice());
    return node;
  }
}

function release(stream) {
  stream.getTracks().forEach((track) => track.stop());
}

async function openMicrophone(sampleRate, frames, begin) {
  // returns what `begin` makes of the stream and its context: its `hear` gets blocks, its `stop` is called where the
  // microphone is unplugged
  if (!navigator.mediaDevices) throw new Error(INSECURE);
  const stream = await navigator.mediaDevices.getUserMedia({ audio: AUDIO });
  try {
    const source = openSource(stream, sampleRate), begun = begin(stream, source.context);
    const listener = await makeListener(source.context, frames, (block) => begun.hear(block));
    stream.getAudioTracks()[0].onended = () => begun.stop();
    source.connect(listener).connect(source.context.destination);
    await source.context.resume(); // Safari forgets the click while it asks the user
    return begun;
  } catch (error) {
    release(stream);
    throw error;
  }
}

function toInt16(blocks) {
  const pcm = new Int16Array(blocks.reduce((frames, block) => frames + block.length, 0));
  let at = 0;
  for (const block of blocks) {
    for (const sample of block) pcm[at++] = Math.max(-32768, Math.min(32767, Math.round(32768 * sample)));
  }
  return pcm;
}

function toBase64(blocks) {
  // as `read_samples` takes "s16le"
  return btoa(Array.from(new Uint8Array(toInt16(blocks).buffer), (byte) => String.fromCharCode(byte)).join(""));
}
