// Templates built with the JavaScript SDK. Run by test_template_js.py, against the Emberbox that builds.
import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { BuildError, Sandbox, Template, waitForFile } from 'e2b'
import { eventually, makeSandbox } from './world.mjs'

const folder = mkdtempSync(join(tmpdir(), 'emberbox-js-'))
mkdirSync(join(folder, 'app'))
writeFileSync(join(folder, 'app', 'main.js'), 'console.log(1)\n')
writeFileSync(join(folder, 'note.txt'), 'note\n')

const names = []
const named = () => {
  names.push(`js-${Math.random().toString(36).slice(2, 12)}`)
  return names.at(-1)
}

after(async () => {
  rmSync(folder, { recursive: true })
  for (const name of names) {
    const url = `${process.env.E2B_API_URL}/templates/${name}`
    await fetch(url, { method: 'DELETE', headers: { 'X-API-Key': process.env.E2B_API_KEY } })
  }
})

test('a template with files and commands is built and started', async () => {
  const name = named()
  const lines = []
  const template = Template({ fileContextPath: folder })
    .fromTemplate('base')
    .copy('app', '/opt/app')
    .copy('*.txt', '/home/user/', { mode: 0o600 })
    .setEnvs({ COLOUR: 'green' })
    .runCmd('echo $COLOUR > ~/colour')
    .setStartCmd('touch /tmp/up; sleep 3333', waitForFile('/tmp/up'))

  const built = await Template.build(template, `${name}:v1`, {
    cpuCount: 1, memoryMB: 512, tags: ['stable'], onBuildLogs: (entry) => lines.push(entry.message),
  })
  const sandbox = await makeSandbox({}, `${name}:stable`)
  const shown = await sandbox.commands.run('cat /opt/app/main.js ~/note.txt ~/colour; stat -c %a ~/note.txt; ls /tmp/up')

  assert.equal(shown.stdout, 'console.log(1)\nnote\ngreen\n600\n/tmp/up\n')
  assert.deepEqual([...built.tags].sort(), ['stable', 'v1'])
  assert.ok(lines.some((line) => line.includes("Uploaded 'app'")), lines.join('\n'))
  assert.equal(await Template.exists(name), true)
  assert.equal(await Template.exists('no-such-template'), false)
})

test('the second build is cached', async () => {
  const name = named()
  const template = () => Template().fromTemplate('base').runCmd('cat /proc/sys/kernel/random/uuid > ~/id')
  const id = async (options) => {
    await Template.build(template(), name, options)
    return (await (await makeSandbox({}, name)).commands.run('cat ~/id')).stdout
  }

  const first = await id()
  const second = await id()
  const forced = await id({ skipCache: true })

  assert.equal(second, first)
  assert.notEqual(forced, first)
})

test('a failing step points at its line', async () => {
  const template = Template()
    .fromTemplate('base')
    .runCmd('echo fine')
    .runCmd('echo broken >&2; exit 9')

  const error = await Template.build(template, named()).then(() => null, (caught) => caught)

  assert.ok(error instanceof BuildError, String(error))
  assert.match(error.message, /9/)
  assert.match(error.stack, /builds\.mjs/)
})

test('a background build is polled', async () => {
  const built = await Template.buildInBackground(Template().fromTemplate('base').runCmd('echo hello'), named())

  const status = await eventually(async () => {
    const found = await Template.getBuildStatus(built)
    return found.status === 'ready' && found
  }, { within: 400, every: 200, what: 'the build is ready' })

  assert.ok(status.logEntries.some((entry) => entry.message.includes('hello')))
})

test('tags are assigned, listed and removed', async () => {
  const name = named()
  await Template.build(Template().fromTemplate('base').runCmd('true'), name)

  await Template.assignTags(`${name}:default`, ['one', 'two'])
  await Template.removeTags(name, 'two')
  const tags = (await Template.getTags(name)).map((tag) => tag.tag).sort()

  assert.deepEqual(tags, ['default', 'one'])
})

test('a Dockerfile is built', async () => {
  const name = named()
  const template = Template({ fileContextPath: folder })
    .fromDockerfile('FROM e2bdev/base\nWORKDIR /work\nCOPY note.txt .\nRUN cat note.txt > copy.txt\n')

  await Template.build(template, name)
  const sandbox = await makeSandbox({}, name)

  assert.equal((await sandbox.commands.run('cat /work/copy.txt; pwd')).stdout, 'note\n/work\n')
})

test('an odd name and an unknown template are refused', async () => {
  await assert.rejects(Template.build(Template().fromTemplate('base'), 'Odd Name'), /not a template name/)
  await assert.rejects(Template.build(Template().fromTemplate('no-such-template'), named()), /not found/)
  await assert.rejects(Sandbox.create(names.at(-1)), /no ready build/)
})
