import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { test } from 'node:test'
import { Sandbox } from 'e2b'
import { makeSandbox, seconds } from './world.mjs'

test('a sandbox has what was asked for', async () => {
  const metadata = { user: '42', 'näme with space': 'v=1&w=2 é' }
  const sandbox = await makeSandbox({ metadata, envs: { GREETING: "hello 'world'" }, timeoutMs: seconds(300) })

  const info = await sandbox.getInfo()
  const output = await sandbox.commands.run('printf "%s" "$GREETING"')

  assert.equal(output.stdout, "hello 'world'")
  assert.deepEqual(info.metadata, metadata)
  assert.equal(info.name, 'base')
  assert.equal(info.state, 'running')
  assert.ok(Math.abs(info.endAt - info.startedAt - seconds(300)) < 60_000)
})

test('lists are filtered and paged', async () => {
  const mark = randomUUID()
  const made = []
  for (let n = 0; n < 3; n++) made.push(await makeSandbox({ metadata: { mark, 'odd key': 'a&b=c é/+%' } }))
  const paginator = Sandbox.list({ query: { metadata: { mark, 'odd key': 'a&b=c é/+%' } }, limit: 2 })

  const pages = []
  while (paginator.hasNext) pages.push((await paginator.nextItems()).map((each) => each.sandboxId))

  assert.deepEqual(pages.map((page) => page.length), [2, 1])
  assert.deepEqual(pages.flat(), made.map((each) => each.sandboxId).reverse())
})

test('lists filter by state, start and template', async () => {
  const mark = randomUUID()
  const first = await makeSandbox({ metadata: { mark } })
  const second = await makeSandbox({ metadata: { mark } })
  await first.pause()
  const ids = async (query) =>
    (await Sandbox.list({ query: { metadata: { mark }, ...query } }).nextItems()).map((each) => each.sandboxId)

  assert.deepEqual(await ids({ state: ['paused'] }), [first.sandboxId])
  assert.deepEqual(await ids({ state: ['running'] }), [second.sandboxId])
  assert.equal((await ids({ state: ['running', 'paused'] })).length, 2)
  assert.deepEqual(await ids({ startedAfter: (await second.getInfo()).startedAt }), [second.sandboxId])
  assert.equal((await ids({ template: 'base' })).length, 2)
  assert.equal((await ids({ template: 'other' })).length, 0)
})

test('kill and isRunning say how it is', async () => {
  const sandbox = await makeSandbox()

  assert.equal(await sandbox.isRunning(), true)
  assert.equal(await Sandbox.kill(sandbox.sandboxId), true)
  assert.equal(await sandbox.isRunning(), false)
  assert.equal(await Sandbox.kill(sandbox.sandboxId), false)
})

test('a port is reached by its host name', async () => {
  const sandbox = await makeSandbox()
  await sandbox.files.write('index.html', 'from inside')
  await sandbox.commands.run('python3 -m http.server 8000', { background: true, timeoutMs: 0 })
  const edge = new URL(process.env.E2B_SANDBOX_URL)
  const { request } = await import('node:http')
  const get = () =>
    new Promise((resolve, reject) => {
      const headers = { Host: sandbox.getHost(8000) }
      request({ host: edge.hostname, port: edge.port, path: '/index.html', headers }, (answer) => {
        let body = ''
        answer.on('data', (chunk) => (body += chunk))
        answer.on('end', () => resolve(body))
      })
        .on('error', reject)
        .end()
    })

  let body = ''
  for (let n = 0; n < 900 && body !== 'from inside'; n++) {
    body = await get()
    if (body !== 'from inside') await new Promise((resolve) => setTimeout(resolve, 100))
  }

  assert.equal(body, 'from inside')
})

test('metrics are sampled', async () => {
  const sandbox = await makeSandbox()
  let metrics = []
  for (let n = 0; n < 180 && metrics.length === 0; n++) {
    metrics = await sandbox.getMetrics()
    await new Promise((resolve) => setTimeout(resolve, 500))
  }

  assert.ok(metrics[0].cpuCount >= 1)
  assert.ok(metrics[0].memUsed > 0 && metrics[0].memUsed <= metrics[0].memTotal)
  assert.ok(metrics[0].diskUsed < metrics[0].diskTotal)
  assert.ok(metrics[0].timestamp instanceof Date)
})
