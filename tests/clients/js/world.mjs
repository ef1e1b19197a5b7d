// What the JavaScript tests share: sandboxes that end with their test file, scaled time, small waits.
import { after } from 'node:test'
import { Sandbox } from 'e2b'

const scale = Number(process.env.EMBERBOX_TEST_SCALE ?? '1')

/** `n` seconds on an ordinary machine, in milliseconds on this one. */
export const seconds = (n) => n * 1000 * scale

export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

/** Asks again until `check` is true or `within` seconds have passed. */
export async function eventually(check, { within = 60, every = 50, what = 'it' } = {}) {
  const deadline = Date.now() + seconds(within)
  for (;;) {
    const value = await check()
    if (value) return value
    if (Date.now() > deadline) throw new Error(`${what} did not happen within ${within} s; last value: ${value}`)
    await pause(every)
  }
}

const made = []

/** A sandbox that is killed when the file's tests are done. */
export async function makeSandbox(options = {}, template = 'base') {
  const sandbox = await Sandbox.create(template, { timeoutMs: seconds(600), ...options })
  made.push(sandbox)
  return sandbox
}

after(async () => {
  await Promise.all(made.map((sandbox) => sandbox.kill()))
})
